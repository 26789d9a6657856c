"""`--check` says of every row what the job would say, without answering any."""

import json
import shutil

import pytest
from job_cases import GREEDY, run_job, written
from tiny_model import OPTIONS

from fineserve_jax import EngineConfig, ModelLoadError
from fineserve_jax.entrypoints.batch import BatchCheck

ROWS = [
    {"id": "good", "prompt": "abc", "max_tokens": 2},
    {"id": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    {"id": "long", "prompt": "x" * 128},
    {"id": "token", "prompt": [96]},
    {"id": "format", "prompt": "abc", "kv_precision": "int3"},
    {"id": "hot", "prompt": "abc", "temperature": -1},
    {"id": "field", "prompt": "abc", "temprature": 1},
    {"id": "good", "prompt": "again"},
    {"id": "model", "prompt": "abc", "model": "other"},
    {"id": "bias", "prompt": "abc", "logit_bias": {"96": 1.0}},
    {"custom_id": "request", "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc", "suffix": "x"}},
]


def config(**options):
    return EngineConfig(**{**OPTIONS, **options})


@pytest.fixture
def source(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*lines, b"{", b"", lines[0].replace(b"good", b"other")]))
    return tmp_path / "in.jsonl"


def test_what_the_check_finds_is_what_the_job_writes(engine, tiny_model, source, tmp_path):
    check = BatchCheck(tiny_model, source, config(), GREEDY)
    found = {finding.line: finding for finding in check.findings()}
    run_job(engine, source.read_bytes().splitlines(keepends=True), tmp_path / "out.jsonl", GREEDY)
    errors = {}
    for row in written(tmp_path / "out.jsonl"):
        error = row.get("error")
        if error is not None:
            error = error if isinstance(error, dict) else {"line": row["line"], "message": row["error"]}
            errors[error["line"]] = error["message"]
    assert found.keys() == errors.keys() == set(range(3, 13))
    same = set(errors) - {8}
    assert {line: found[line].error for line in same} == {line: errors[line] for line in same}
    assert found[8].error == "id 'good' is that of another row; give every row an id of its own"
    assert {line: found[line].code for line in (8, 11, 12)} == {
        8: "duplicate_id",
        11: "unsupported_parameter",
        12: "invalid_line",
    }
    assert (check.num_rows, check.num_prompt_tokens) == (13, 3 + len("<user>Hi\n<assistant>") + 3)


def test_no_weights_are_read(tiny_model, source, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    for file in copy.glob("*.safetensors"):
        header = file.read_bytes()[:8]
        size = int.from_bytes(header, "little")
        content = bytearray(file.read_bytes())
        content[8 + size :] = bytes(len(content) - 8 - size)
        file.write_bytes(bytes(content))
    names = {finding.line for finding in BatchCheck(copy, source, config(), GREEDY).findings()}
    assert names == set(range(3, 13))


def test_several_models_are_known_by_their_names(tiny_model, tmp_path):
    rows = [{"prompt": "a", "model": "small"}, {"prompt": "a"}, {"prompt": "a" * 50, "model": "short"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    models = {"small": str(tiny_model), "short": {"model": str(tiny_model), "max_seq_len": 32}}
    found = {finding.line: finding.error for finding in BatchCheck(models, tmp_path / "in.jsonl", config()).findings()}
    assert found.keys() == {2, 3}
    assert found[2].startswith("no model is named, and there are several")
    assert "the prompt has 50 tokens; with max_seq_len=32 it may have 31" in found[3]


def test_a_model_that_is_not_there_is_refused(source):
    with pytest.raises(ModelLoadError, match="'none' is neither a path"):
        BatchCheck("none", source, config())
