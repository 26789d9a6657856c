"""Compiles cases for all chips of a platform, and counts their traffic."""

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from benchmarks.aot.cases import Case
from benchmarks.aot.results import Bytes, Result
from benchmarks.aot.targets import TARGETS, Platform
from benchmarks.aot.workers import Worker

log = logging.getLogger(__name__)


def run(
    platform: Platform, cases: Sequence[Case], known: Mapping[tuple[str, str], Result], full: bool = False
) -> Iterator[Result]:
    """The results of `cases`, which are some of `all_cases(platform, full)`, each for each chip.

    Those of `known`, by `Result.key`, that are of the same programs and compilers are not compiled again. Traffic is
    always counted.

    TPU chips at the same time: Mosaic takes longer than Triton, and so has a core to itself in the end.
    """
    targets = TARGETS[platform]
    workers = [Worker([target], full) for target in targets] if platform == "tpu" else [Worker(targets, full)]
    with ThreadPoolExecutor(len(workers)) as pool:
        for case in cases:
            compiled = [pool.submit(worker.compile, case, known) for worker in workers]
            traffic, traffic_error = _count(case)
            for future in compiled:
                for result in future.result():
                    yield dataclasses.replace(
                        result, bytes=traffic, traffic_error=traffic_error, strict_bytes=case.strict_bytes
                    )
    for worker in workers:
        worker.close()


def _count(case: Case) -> tuple[Bytes | None, str]:
    if case.batch is None:
        return None, ""
    try:
        return case.batch.count(), ""
    except Exception as error:
        log.debug("%s", case.title, exc_info=True)
        return None, f"{type(error).__name__}: {error}"
