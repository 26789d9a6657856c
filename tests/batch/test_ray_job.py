"""A job on a Ray cluster gives what one process gives, whatever dies."""

import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from ray_engines import deadly_engine, noted_engine
from stub_engine import StubEngine
from tiny_model import OPTIONS

from fineserve_jax import ConfigError, EngineConfig, FineServeError, FineServePredictor
from fineserve_jax.entrypoints.batch import run_batch
from fineserve_jax.entrypoints.batch.ray_job import RayOptions, import_ray, predictor_arguments

TWO = RayOptions(ray_actors=2, ray_cpus=0.5, ray_rows_per_task=16)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def ray():
    """A cluster on this machine whose processes find the tests' modules."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fineserve-jax[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (HERE, HERE.parents[1]))))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"id": i, "prompt": f"row {i}", "temperature": 1.0, "max_tokens": 5 + i % 20} for i in range(100)]
    rows[7] |= {"temperature": -1.0}
    rows[50] |= {"id": 20}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return path


def lines(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines())


def without_ray(source: Path, target: Path) -> list[bytes]:
    run_batch("stub", source, target, timing=False, make_engine=lambda: StubEngine(4))
    return lines(target)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_actors_give_the_answers_of_one_process(ray, source, tmp_path):
    (tmp_path / "pids").mkdir()
    make = functools.partial(noted_engine, str(tmp_path / "pids"), 0.1)  # slow enough for both to take part
    summary = run_batch("stub", source, tmp_path / "ray.jsonl", timing=False, make_engine=make, ray=TWO)
    assert len(list((tmp_path / "pids").iterdir())) == 2
    assert lines(tmp_path / "ray.jsonl") == without_ray(source, tmp_path / "one.jsonl")
    assert (summary.answered, summary.errors) == (98, 3)
    assert summary.sampled_tokens == summary.output_tokens > 0
    assert summary.error_kinds == {"invalid_request": 1, "duplicate_id": 1, "invalid_line": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ordered", [False, True])
def test_an_actor_that_is_killed_costs_nothing(ray, source, tmp_path, ordered):
    pids, target = tmp_path / "pids", tmp_path / "ray.jsonl"
    pids.mkdir()
    killed = []

    def kill_one():
        while not (target.exists() and target.read_bytes().count(b'"text"') > 3):
            time.sleep(0.05)
        killed.append(int(next(pids.iterdir()).name))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    make = functools.partial(noted_engine, str(pids), 0.1)
    run_batch("stub", source, target, timing=False, make_engine=make, ray=TWO, ordered=ordered)
    killer.join(timeout=1)
    assert len(killed) == 1
    assert len(list(pids.iterdir())) == 3  # two actors, and one in the place of the dead
    assert lines(target) == without_ray(source, tmp_path / "one.jsonl")
    if ordered:
        ids = [row["id"] for row in map(json.loads, target.read_bytes().splitlines())]
        assert ids == [*range(50), 20, *range(51, 100), 101]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_row_that_kills_its_process_is_left_to_be_resumed_and_the_others_are_answered(ray, source, tmp_path):
    rows = [json.loads(line) for line in source.read_text().splitlines()[:-1]]
    rows[30]["prompt"] = "~deadly"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    token = StubEngine().tokenizer.encode("~")[0]
    make, target = functools.partial(deadly_engine, token), tmp_path / "ray.jsonl"
    with pytest.raises(FineServeError, match=r"16 rows are not answered: .* --resume tries them again"):
        run_batch("stub", source, target, timing=False, make_engine=make, ray=TWO)
    assert len(lines(target)) == 84
    summary = run_batch("stub", source, target, timing=False, resume=True, make_engine=lambda: StubEngine(4))
    assert (summary.skipped, summary.answered) == (84, 16)
    assert lines(target) == without_ray(source, tmp_path / "one.jsonl")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_engine_and_a_users_own_pipeline(ray, tiny_model, tmp_path):
    """Greedy and sampled answers, and those of two actors, are those of one process."""
    rows = [{"prompt": f"row {i}", "max_tokens": 6, "temperature": float(i % 2), "seed": i} for i in range(12)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = EngineConfig(**OPTIONS)
    run_batch(str(tiny_model), source, tmp_path / "one.jsonl", config, timing=False)
    two = TWO.model_copy(update={"ray_rows_per_task": 6})
    run_batch(str(tiny_model), source, tmp_path / "two.jsonl", config, timing=False, ray=two)
    assert lines(tmp_path / "two.jsonl") == lines(tmp_path / "one.jsonl")

    texts = {row["id"]: row["text"] for row in map(json.loads, lines(tmp_path / "one.jsonl"))}
    answered = ray.data.from_items([{**row, "label": i} for i, row in enumerate(rows)]).map_batches(
        FineServePredictor,
        fn_constructor_kwargs={"model": str(tiny_model), **OPTIONS},
        batch_size=6,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    for row in answered.take_all():
        assert (row["text"], row["error"]) == (texts[row["label"] + 1], None)


# -- what needs no cluster -------------------------------------------------------------------------------------


def test_files_of_a_single_engine_are_refused(tmp_path):
    config = EngineConfig(record=tmp_path / "run", kv_precision="int8")
    with pytest.raises(ConfigError, match=r"record=.* is a file of one engine, and a cluster has several"):
        predictor_arguments("model", config, {}, 2)
    arguments = predictor_arguments("model", EngineConfig(kv_precision="int8"), {"max_tokens": 3}, 2)
    assert arguments["kv_precision"] == "int8"
    assert arguments["sampling"] == {"max_tokens": 3}


def test_ray_that_is_not_there_is_told_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"--ray needs Ray: pip install 'fineserve-jax\[ray\]'"):
        import_ray()
    with pytest.raises(ConfigError, match="--ray needs Ray"):
        run_batch("stub", source, tmp_path / "answers.jsonl", ray=TWO)
    assert not (tmp_path / "answers.jsonl").exists()
