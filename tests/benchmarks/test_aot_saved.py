"""Which cases of the ahead-of-time matrix are compiled, and what is saved of a run; its compilers are not here."""

import dataclasses

import pytest

import benchmarks.aot.__main__ as command
from benchmarks.aot import matrix, results, run
from benchmarks.aot.cases import Case
from benchmarks.aot.fingerprint import fingerprint
from benchmarks.aot.targets import A100, H100, TARGETS


def case(operation):
    return Case(operation, "model", "int8", abs, (), arena_size=0, head_dim=64)


CASES = [case(operation) for operation in ("decode", "ragged", "commit")]


@pytest.fixture
def compile_all(tmp_path, monkeypatch):
    """Runs the command; returns which cases it compiled and what it saved. A program is what `programs` says it is."""
    programs = {one.title: "as at first" for one in CASES}
    monkeypatch.setattr(matrix, "all_cases", lambda platform, full: CASES)
    monkeypatch.setattr(command, "ENVIRONMENT", {"gpu": {}})
    monkeypatch.setattr(command, "log_from", lambda level: None)

    def fake_run(platform, cases, known, full):
        for one in cases:
            for target in TARGETS[platform]:
                new = one.result(target.name, fingerprint=programs[one.title], compile_s=float(next(clock)))
                old = known.get(new.key)
                if not new.is_of_same_program(old):
                    compiled.append(new.key)
                yield old if new.is_of_same_program(old) else new

    def compile_all(changed=(), **options):
        compiled.clear()
        programs.update({case(operation).title: f"at {next(clock)}" for operation in changed})
        assert command.main("gpu", folder=tmp_path, **options) == 0
        return list(compiled), results.load(tmp_path / "gpu.json")

    clock, compiled = iter(range(1000)), []
    monkeypatch.setattr(run, "run", fake_run)
    return compile_all


def keys(*operations):
    return [(target.name, case(operation).title) for operation in operations for target in TARGETS["gpu"]]


def test_only_what_has_changed_is_compiled_unless_all_is_asked_for(compile_all):
    everything = keys("decode", "ragged", "commit")
    compiled, first = compile_all()
    assert compiled == [result.key for result in first] == everything
    assert compile_all() == ([], first)
    compiled, second = compile_all(changed=["ragged"])
    assert compiled == keys("ragged")
    assert [old.key for old, new in zip(first, second, strict=True) if old != new] == keys("ragged")
    compiled, _ = compile_all(everything=True)
    assert compiled == everything


def test_a_run_of_some_cases_keeps_the_results_of_the_others(compile_all):
    _, first = compile_all()
    compiled, second = compile_all(changed=["decode", "ragged", "commit"], only="ragged")
    assert compiled == keys("ragged")
    assert [new.key for new in second] == [old.key for old in first]
    assert [old.key for old, new in zip(first, second, strict=True) if old == new] == keys("decode", "commit")


def test_results_of_cases_that_are_gone_go_too(compile_all, monkeypatch):
    compile_all()
    monkeypatch.setattr(matrix, "all_cases", lambda platform, full: CASES[1:])
    assert [result.key for result in compile_all()[1]] == keys("ragged", "commit")


def test_everything_that_a_result_is_made_from_counts(monkeypatch):
    def of(lowered=("program",), target=H100, packages=("jax",), readers=("ptx.py",), tools=("ptxas 1",)):
        return fingerprint(lowered, target, packages, readers, tools)

    others = [
        of(lowered=["another program"]),
        of(lowered=["program", "the program without scales"]),
        of(target=A100),
        of(target=dataclasses.replace(H100, config="more shared memory")),
        of(packages=["jax", "jaxlib"]),
        of(readers=["tpu.py"]),
        of(tools=["ptxas 2"]),
    ]
    same = of()
    assert same == of()
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4")
    others.append(of())
    assert len({same, *others}) == 1 + len(others)
