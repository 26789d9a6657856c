"""A compiler that crashes costs a process, not the run; what has not changed costs no compiler."""

import dataclasses
import os
import signal
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import jax
import pytest

from benchmarks.aot.cases import Case
from benchmarks.aot.results import Result
from benchmarks.aot.targets import Target
from benchmarks.aot.workers import ATTEMPTS, Worker

CHIP = Target("chip", "tpu", "none")


def case(formats: str) -> Case:
    return Case("decode", "model", formats, jax.numpy.sin, (), arena_size=0, head_dim=64)


class Compiler:
    """Crashes as a compiler in native code does: in formats `N times`, the first N times, told by files."""

    target = CHIP

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def fingerprint(self, case: Case) -> str:
        return f"of {case.formats}"

    def compile(self, case: Case) -> Result:
        crashed = len(list(self.folder.iterdir()))
        if crashed < int(case.formats.split()[0]):
            (self.folder / str(crashed)).touch()
            os.kill(os.getpid(), signal.SIGSEGV)
        if case.formats.endswith("raises"):
            raise ValueError("no such operation")
        return case.result("chip", compile_s=1.0)


class Begin:
    """Of a worker's process: that compiler, and some cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, targets, full):
        cases = {case(formats).title: case(formats) for formats in FORMATS}
        return {"chip": Compiler(self.folder)}, cases


def no_compilers(targets, full):
    raise ModuleNotFoundError("libtpu")


FORMATS = ("0 times", f"{ATTEMPTS - 1} times", f"{ATTEMPTS} times", "0 times, and raises")


@pytest.mark.parametrize("formats", FORMATS)
def test_a_crash_is_a_result(formats, tmp_path):
    worker = Worker([CHIP], full=False, begin=Begin(tmp_path))
    [result] = worker.compile(case(formats), {})
    [after] = worker.compile(case("0 times"), {})
    worker.close()
    crashes = int(formats.split()[0])
    assert result.crashes == crashes == len(list(tmp_path.iterdir()))
    if crashes == ATTEMPTS:
        assert result.problems() == [f"does not compile: its compiler crashed {ATTEMPTS} times"]
    elif formats.endswith("raises"):
        assert result.problems() == ["does not compile: ValueError: no such operation"]
    else:
        assert not result.problems()
        assert bool(result.remarks()) == (crashes > 0)
    assert not after.problems()
    assert after.crashes == 0
    assert bool(result.fingerprint) == (not result.error)


@pytest.mark.parametrize(
    ("fingerprint", "compiled"), [("of 0 times", False), ("of what it was before", True), ("", True)]
)
def test_a_case_is_compiled_if_its_fingerprint_is_not_that_of_the_known_result(fingerprint, compiled, tmp_path):
    known = case("0 times").result("chip", compile_s=7.0, crashes=1, fingerprint=fingerprint)
    other = dataclasses.replace(known, target="another chip", fingerprint="of 0 times")
    worker = Worker([CHIP], full=False, begin=Begin(tmp_path))
    [result] = worker.compile(case("0 times"), {one.key: one for one in (known, other)})
    worker.close()
    if compiled:
        assert result == case("0 times").result("chip", compile_s=1.0, fingerprint="of 0 times")
    else:
        assert result == known
    assert result.is_of_same_program(known) == (not compiled)


def test_an_error_is_never_taken_as_known(tmp_path):
    failed = case("0 times").result("chip", error="its compiler crashed 3 times")
    worker = Worker([CHIP], full=False, begin=Begin(tmp_path))
    [result] = worker.compile(case("0 times"), {failed.key: failed})
    worker.close()
    assert not result.error
    assert not failed.is_of_same_program(failed)


def test_compilers_that_are_not_there_end_the_run_at_once():
    with pytest.raises(BrokenProcessPool):
        Worker([CHIP], full=False, begin=no_compilers)
