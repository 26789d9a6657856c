"""Compilers in processes of their own: one that crashes, as libtpu's now and then does, takes no other along."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Protocol

from benchmarks.aot.cases import Case
from benchmarks.aot.logs import log_from
from benchmarks.aot.matrix import all_cases
from benchmarks.aot.results import Result
from benchmarks.aot.targets import Target

ATTEMPTS = 3  # crashes after which a case counts as one that does not compile

log = logging.getLogger(__name__)


class Compiler(Protocol):
    """What `GpuCompiler` and `TpuCompiler` have in common."""

    target: Target

    def fingerprint(self, case: Case) -> str: ...

    def compile(self, case: Case) -> Result: ...


Begin = Callable[[Sequence[Target], bool], tuple[dict[str, Compiler], dict[str, Case]]]


def compilers_and_cases(targets: Sequence[Target], full: bool) -> tuple[dict[str, Compiler], dict[str, Case]]:
    """Of real chips, all of one platform."""
    cases = {case.title: case for case in all_cases(targets[0].platform, full)}
    return {target.name: _compiler(target) for target in targets}, cases


def _compiler(target: Target) -> Compiler:
    if target.platform == "gpu":
        from benchmarks.aot.gpu import GpuCompiler

        return GpuCompiler(target)
    from benchmarks.aot.tpu import TpuCompiler

    return TpuCompiler(target)


class Worker:
    """Compiles cases of `all_cases` in another process: they cannot be sent there, but their titles can.

    Args:
        targets: the chips it compiles for, of one platform.
        full: which cases there are; see `all_cases`.
        begin: gives a new process its cases, by title, and its compilers, by the names of their chips.

    Raises:
        BrokenProcessPool: `begin` raised; what, is printed.
    """

    def __init__(self, targets: Sequence[Target], full: bool, begin: Begin = compilers_and_cases) -> None:
        self._targets, self._full, self._begin = tuple(targets), full, begin
        self._pool = self._start()
        self._pool.submit(bool).result()

    def compile(self, case: Case, known: Mapping[tuple[str, str], Result]) -> list[Result]:
        """A case's results, one a chip; that a compiler raised or crashed is one, too.

        Args:
            known: results by `Result.key`. One that has the fingerprint that the case has now is taken as it is.
        """
        return [self._compile(case, target.name, known.get((target.name, case.title))) for target in self._targets]

    def close(self) -> None:
        self._pool.shutdown()

    def _compile(self, case: Case, target: str, known: Result | None) -> Result:
        for crashes in range(ATTEMPTS):
            try:
                result = self._pool.submit(_compile, case.title, target, known).result()
                return result if result == known else dataclasses.replace(result, crashes=crashes)
            except BrokenProcessPool:
                self._pool = self._start()
        return case.result(target, error=f"its compiler crashed {ATTEMPTS} times", crashes=ATTEMPTS)

    def _start(self) -> ProcessPoolExecutor:
        arguments = (self._begin, self._targets, self._full, log.getEffectiveLevel())
        return ProcessPoolExecutor(1, get_context("spawn"), initializer=_start, initargs=arguments)


# What the worker's process has to work with.
_compilers: dict[str, Compiler]
_cases: dict[str, Case]


def _start(begin: Begin, targets: Sequence[Target], full: bool, log_level: int) -> None:
    global _compilers, _cases
    log_from(log_level)
    _compilers, _cases = begin(targets, full)


def _compile(title: str, target: str, known: Result | None) -> Result:
    case, compiler = _cases[title], _compilers[target]
    try:
        fingerprint = compiler.fingerprint(case)
        if known is not None and known.fingerprint == fingerprint:
            return known
        return dataclasses.replace(compiler.compile(case), fingerprint=fingerprint)
    except Exception as error:
        log.debug("%s", title, exc_info=True)
        message = f"{type(error).__name__}: {error}"
        return case.result(target, error=message[:2000])
