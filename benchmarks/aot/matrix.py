"""Compiles all cases of a platform."""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from benchmarks.aot.attention_cases import attention_cases
from benchmarks.aot.cases import Case
from benchmarks.aot.results import Bytes, Result
from benchmarks.aot.step_cases import step_cases
from benchmarks.aot.targets import TARGETS, Platform, Target
from benchmarks.aot.writing_cases import writing_cases

log = logging.getLogger(__name__)


class Compiler(Protocol):
    """What `GpuCompiler` and `TpuCompiler` have in common."""

    target: Target

    def compile(self, case: Case) -> Result: ...


def all_cases(platform: Platform, full: bool = False) -> list[Case]:
    """Every case of a platform; `full`: with formats by themselves at the shapes of every model."""
    return [*attention_cases(platform, full), *writing_cases(platform, full), *step_cases(platform)]


def run(platform: Platform, cases: Sequence[Case]) -> Iterator[Result]:
    """Compiles each case for each chip of the platform, and counts its traffic once.

    TPU chips at the same time: Mosaic takes longer than Triton, and so has a core to itself in the end.
    """
    compilers = [_compiler(target) for target in TARGETS[platform]]
    with ThreadPoolExecutor(len(compilers) if platform == "tpu" else 1) as pool:
        for case in cases:
            compiled = [pool.submit(_attempt, compiler, case) for compiler in compilers]
            traffic, traffic_error = _count(case)
            for future in compiled:
                yield dataclasses.replace(
                    future.result(), bytes=traffic, traffic_error=traffic_error, strict_bytes=case.strict_bytes
                )


def _compiler(target: Target) -> Compiler:
    if target.platform == "gpu":
        from benchmarks.aot.gpu import GpuCompiler

        return GpuCompiler(target)
    from benchmarks.aot.tpu import TpuCompiler

    return TpuCompiler(target)


def _attempt(compiler: Compiler, case: Case) -> Result:
    """A case's result; whatever the compilers raise is a result too."""
    try:
        return compiler.compile(case)
    except Exception as error:
        log.debug("%s", case.title, exc_info=True)
        message = f"{type(error).__name__}: {error}"
        return case.result(compiler.target.name, error=message[:2000])


def _count(case: Case) -> tuple[Bytes | None, str]:
    if case.batch is None:
        return None, ""
    try:
        return case.batch.count(), ""
    except Exception as error:
        log.debug("%s", case.title, exc_info=True)
        return None, f"{type(error).__name__}: {error}"
