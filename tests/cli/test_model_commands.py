"""Commands that are given several models."""

import json

from tiny_model import OPTIONS


def test_batch_serves_two_models_from_one_command(run, tiny_model, tmp_path):
    rows = [{"prompt": "abc", "model": name} for name in ("exact", "rough", "other")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = ["--model", f"exact={tiny_model}", "--model", f"rough={tiny_model}:int4"]
    options = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
    files = ["-i", tmp_path / "prompts.jsonl", "-o", tmp_path / "answers.jsonl"]
    status, _, err = run("batch", *models, *options, *files, "--max-tokens", 4, "--ignore-eos")
    assert status == 0
    assert "2 answered, 1 errors" in err
    answers = {row["id"]: row for row in map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())}
    assert [answers[i]["model"] for i in (1, 2)] == ["exact", "rough"]
    assert answers[3]["error"] == "model='other' is not served; choose one of exact, rough"


def test_generate_takes_one_of_the_models_of_a_file(run, tiny_model, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(f"models:\n  exact: {tiny_model}\n  rough: {{model: {tiny_model}, weights: int4}}\n")
    options = ["--config", path, "--raw", "--max-tokens", 2, "--max-seq-len", 64, "--kv-memory", "8MiB"]
    status, _, err = run("generate", "abc", *options)
    assert status == 2
    assert err.endswith("this command takes one; give --model with one of exact, rough\n")
    status, _, err = run("generate", "abc", *options, "--model", "rough")
    assert status == 0
    assert "bf16 KV, int4 weights]" in err
