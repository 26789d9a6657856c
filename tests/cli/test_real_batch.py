"""The whole way with the real model: the project's example prompts, mixed precisions in one batch."""

import json
from pathlib import Path

import pytest

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.entrypoints.batch import run_batch

PROMPTS = Path(__file__).parents[2] / "examples" / "prompts.jsonl"


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Here speed counts."""


@pytest.mark.real_model
@pytest.mark.slow
def test_the_example_prompts_are_answered(tmp_path, capsys):
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    config = EngineConfig(kv_memory="256MiB", max_batch_size=16)
    summary = run_batch("smollm2-135m", PROMPTS, tmp_path / "answers.jsonl", config)
    answers = {row["id"]: row for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    assert (summary.answered, summary.errors) == (len(rows), 0)
    assert {name for name, part in summary.formats.items() if part.rows} == {
        "bf16",
        "int8",
        "int4",
    }
    for number, row in enumerate(rows, start=1):
        answer = answers[row.get("id", number)]
        assert answer["kv_precision"] == row.get("kv_precision", "bf16")
        assert answer["output_tokens"] <= row["max_tokens"] * row.get("n", 1)
    # The one answer of which this small model is sure; the others may turn on a near-tie between two tokens.
    assert "Paris" in answers["capital"]["text"]
    assert "\n" not in answers["code"]["text"]
    assert len(answers["names"]["samples"]) == 3
