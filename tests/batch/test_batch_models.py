"""The batch job with several models: every row is answered by the one it names."""

import pytest
from job_cases import GREEDY, alone, by_id, run_job, written
from tiny_model import OPTIONS

from fineserve_jax import ConfigError, Engine, EngineConfig, ModelLoadError
from fineserve_jax.entrypoints.batch import run_batch
from fineserve_jax.loaders import load_model

PROMPTS = ["abc", "prompt number 2", "x" * 40]


@pytest.fixture(scope="module")
def models(tiny_model):
    return {"exact": load_model(tiny_model, "fp32"), "rough": load_model(tiny_model, "int4")}


@pytest.fixture(scope="module")
def engine(models):
    return Engine(models, EngineConfig(**OPTIONS))


def test_every_row_is_answered_by_its_model_as_if_that_were_alone(engine, models, tmp_path):
    rows = [
        {"id": f"{name} {i}", "prompt": prompt, "model": name, "kv_precision": ["int4", "int8"][i % 2], "logprobs": 0}
        for i, prompt in enumerate(PROMPTS)
        for name in models
    ]
    summary = run_job(engine, rows, tmp_path / "answers.jsonl", GREEDY)
    answers = by_id(written(tmp_path / "answers.jsonl"))
    assert (summary.answered, summary.errors) == (len(rows), 0)
    for name, model in models.items():
        own = Engine(model, EngineConfig(**OPTIONS))
        for row in (row for row in rows if row["model"] == name):
            answer = answers[row["id"]]
            assert (answer["model"], answer["kv_precision"]) == (name, row["kv_precision"])
            assert answer["text"] == alone(own, row["prompt"], row["kv_precision"])
            assert "".join(entry["text"] for entry in answer["logprobs"]) == answer["text"]


def test_a_row_that_names_no_model_or_an_unknown_one_is_an_error(engine, tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "a", "model": "round"}, {"prompt": "a", "model": 5}]
    run_job(engine, rows, tmp_path / "answers.jsonl", GREEDY)
    answers = sorted(written(tmp_path / "answers.jsonl"), key=lambda answer: answer["line"])
    assert [answer["error"] for answer in answers] == [
        "no model is named, and there are several; give model as one of exact, rough",
        "model='round' is not served; choose one of exact, rough",
        'model=5 is a JSON number; give text such as "smollm2-135m"',
    ]


def test_what_is_wrong_with_any_model_is_said_before_the_output_is_touched(tiny_model, tmp_path):
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "a", "model": "good"}\n')
    target.write_text("precious\n")
    for bad, error, message in [
        (3, ConfigError, "model 'bad' is 3"),
        ("no-such-model", ModelLoadError, "'no-such-model' is neither a path"),
        (tmp_path / "none.gguf", ModelLoadError, "none.gguf' is neither a path"),
    ]:
        with pytest.raises(error, match=message):
            run_batch({"good": tiny_model, "bad": bad}, source, target, EngineConfig(**OPTIONS), overwrite=True)
        assert target.read_text() == "precious\n"
