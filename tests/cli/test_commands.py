"""The commands as typed: what they print, where, and with what exit status."""

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
from tiny_model import OPTIONS

from fineserve_jax import LLM, Engine, EngineConfig, SamplingParams
from fineserve_jax.engine.perplexity import measure_perplexity
from fineserve_jax.entrypoints.batch.answers import AnswerFile
from fineserve_jax.entrypoints.cli import main
from fineserve_jax.loaders import load_model


def one_line_error(err):
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "plain", "prompt": "abc", "max_tokens": 3, "ignore_eos": True},
        # With int4 this makes the programs that the other tests here need, too.
        {"id": "chat", "messages": [{"role": "user", "content": "Hi"}], "kv_precision": "int8"},
        {"id": "bad", "prompt": "abc", "kv_precision": "int3"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return path


# -- batch -------------------------------------------------------------------------------------------------


def test_batch_answers_a_file_and_tells_what_it_did(run, prompts, tmp_path):
    output = tmp_path / "answers.jsonl"
    status, out, err = run("batch", "MODEL", "-i", prompts, "-o", output, "--max-tokens", 5)
    assert (status, out) == (0, "")
    answers = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert set(answers) == {"plain", "chat", "bad", 4}
    assert answers["plain"]["output_tokens"] == 3
    assert answers["chat"]["output_tokens"] <= 5
    assert (answers["plain"]["kv_precision"], answers["chat"]["kv_precision"]) == ("int4", "int8")
    assert answers[4]["error"].startswith("line 4 is not JSON")
    assert "2 answered, 2 errors" in err
    assert "rows=4 of=4 errors=2" in err

    status, _, err = run("batch", "MODEL", "-i", prompts, "-o", output)
    assert status == 2
    assert "exists" in one_line_error(err)
    status, _, err = run("batch", "MODEL", "-i", prompts, "-o", output, "--resume")
    assert status == 2
    assert "was begun otherwise: max_tokens was 5 and is None" in one_line_error(err)
    status, _, err = run("batch", "MODEL", "-i", prompts, "-o", output, "--max-tokens", 5, "--resume")
    assert status == 0
    assert "0 answered, 0 errors, 4 answered earlier (2 of them errors)" in err
    assert len(output.read_text().splitlines()) == 4


def test_batch_reads_stdin_and_writes_stdout(run, monkeypatch):
    stdin = io.TextIOWrapper(io.BytesIO(b'{"prompt": "abc", "max_tokens": 2, "ignore_eos": true}\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    status, _, _ = run("batch", "MODEL", "--input", "-", "--output", "-")
    assert status == 0
    assert json.loads(out.buffer.getvalue())["output_tokens"] == 2


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["-i", "none.jsonl", "-o", "out"], "the input none.jsonl cannot be read: No such file"),
        (["-i", ".", "-o", "out"], "the input . is a directory"),
        (["-i", "prompts.jsonl", "-o", "none/out"], "there is no directory none; create it"),
        (["-i", "prompts.jsonl", "-o", "."], "the output . is a directory"),
        (["-i", "prompts.jsonl", "-o", "prompts.jsonl", "--overwrite"], "prompts.jsonl is the input, too"),
        (["-i", "prompts.jsonl", "-o", "out", "--resume", "--overwrite"], "give one of them"),
        (["-i", "prompts.jsonl"], "there is no output; give a file with -o, - for stdout, or --check"),
        (["-i", "prompts.jsonl", "-o", "out.csv"], "would hold JSON lines, whatever its name says; call it out.jsonl"),
        (["-i", "prompts.jsonl", "-o", "s3://bucket/out"], "the output s3://bucket/out is an address; answers are"),
        (["-i", "none-*.jsonl", "-o", "out"], "the input none-*.jsonl matches no file"),
        (["-i", "-", "-o", "out", "--resume"], "stdin, or a pipe, cannot be resumed"),
        (["-i", "prompts.jsonl", "-o", "out", "--max-retries", "-1"], "max_retries=-1 is less than 0"),
        (["-i", "prompts.jsonl", "-o", "out", "--kv-precision", "int7"], "kv_precision='int7'"),
        (["-i", "prompts.jsonl", "-o", "out", "--temperature", "-1"], "temperature=-1.0"),
        (["-i", "prompts.jsonl", "-o", "out", "--config", "none.yaml"], "cannot read the configuration"),
        (["-i", "prompts.jsonl", "-o", "out", "--model", "none.gguf"], "model 'none.gguf' is neither"),
    ],
)
def test_batch_refuses_before_it_loads_a_model(run, prompts, tmp_path, monkeypatch, options, error):
    monkeypatch.chdir(tmp_path)
    before = prompts.read_bytes()
    files = set(os.listdir())
    model = [] if "--model" in options else ["--model", "no-such-model"]
    status, out, err = run("batch", *options, *model)
    assert (status, out) == (2, "")
    assert error in one_line_error(err)
    assert set(os.listdir()) == files
    assert prompts.read_bytes() == before


def test_ctrl_c_in_a_batch_leaves_what_was_written(run, prompts, tmp_path, monkeypatch):
    def interrupt(self, line):
        write(self, line)
        if json.loads(line)["id"] == "bad":
            raise KeyboardInterrupt

    write = AnswerFile.write
    monkeypatch.setattr(AnswerFile, "write", interrupt)
    output = tmp_path / "answers.jsonl"
    status, _, err = run("batch", "MODEL", "-i", prompts, "-o", output)
    assert status == 130
    assert "Interrupted: 0 answered, 2 errors" in err
    assert "errors: 1 invalid_line, 1 invalid_request" in err
    assert err.endswith("run the same command with --resume to go on\n")
    assert "Traceback" not in err
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [4, "bad"]


def test_sigterm_ends_a_batch_as_cleanly_and_tells_so_by_its_status(run, prompts, tmp_path, monkeypatch):
    def terminate(self, line):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(self, line)

    write = AnswerFile.write
    monkeypatch.setattr(AnswerFile, "write", terminate)
    output = tmp_path / "answers.jsonl"
    status, _, err = run("batch", "MODEL", "-i", prompts, "-o", output)
    assert status == 128 + signal.SIGTERM
    assert "Interrupted: " in err
    monkeypatch.setattr(AnswerFile, "write", write)
    status, _, err = run("batch", "MODEL", "-i", prompts, "-o", output, "--resume")
    assert status == 0
    assert len(output.read_text().splitlines()) == 4


def test_a_check_names_each_bad_row_by_its_line_and_answers_nothing(run, prompts, tmp_path):
    status, out, err = run("batch", "MODEL", "-i", prompts, "--check")
    assert status == 1
    bad, broken = out.splitlines()
    assert bad.startswith(f"{prompts}:3: kv_precision='int3' is not served; choose one of ")
    assert broken.startswith(f"{prompts}:4: line 4 is not JSON")
    assert "4 rows, 2 of them bad, " in err
    good = tmp_path / "good.jsonl"
    good.write_text('{"prompt": "abc"}\n')
    status, out, err = run("batch", "MODEL", "-i", good, "--check")
    assert (status, out, err) == (0, "", "1 rows, 0 of them bad, 3 prompt tokens\n")


def test_batch_takes_several_inputs_and_keeps_their_order(run, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            f'{{"id": "{name}1", "prompt": "x"}}\n{{"id": "{name}2", "prompt": "y"}}\n'
        )
    output = tmp_path / "answers.jsonl"
    files = ["-i", tmp_path / "b.jsonl", "-i", tmp_path / "a.jsonl", "-o", output]
    status, _, _ = run("batch", "MODEL", *files, "--ordered", "--no-timing", "--max-tokens", 2)
    assert status == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == ["b1", "b2", "a1", "a2"]
    assert all("timing" not in row for row in rows)


# -- generate ----------------------------------------------------------------------------------------------


def test_generate_prints_the_answer_and_nothing_else_on_stdout(run, tiny_model):
    llm = LLM(str(tiny_model), **OPTIONS)
    sampling = SamplingParams(max_tokens=4, ignore_eos=True)
    flags = ["--max-tokens", 4, "--ignore-eos"]
    (chatted,) = llm.chat([{"role": "user", "content": "abc"}], sampling)
    (continued,) = llm.generate("abc", sampling)
    status, out, err = run("generate", "abc", "MODEL", *flags)
    assert (status, out) == (0, f"{chatted.outputs[0].text}\n")
    assert f"[{len(chatted.prompt_token_ids)} prompt and 4 output tokens; first text after" in err
    status, out, err = run("generate", "abc", "MODEL", *flags, "--raw")
    assert (status, out) == (0, f"{continued.outputs[0].text}\n")
    assert "[3 prompt and 4 output tokens;" in err
    assert chatted.outputs[0].text != continued.outputs[0].text


def test_generate_reads_the_prompt_from_stdin(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"abcd")))
    _, _, err = run("generate", "-", "MODEL", "--max-tokens", 1, "--raw")
    assert "[4 prompt and 1 output tokens;" in err


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_generate_refuses_an_empty_prompt(run, prompt):
    status, _, err = run("generate", prompt, "--model", "no-such-model")
    assert status == 2
    assert one_line_error(err) == "error: the prompt is empty; give some text, or - to read it from stdin"


def test_generate_refuses_a_prompt_that_is_too_long(run):
    status, _, err = run("generate", "x" * 128, "MODEL", "--raw")
    assert status == 2
    assert "the prompt has 128 tokens; with max_seq_len=128" in one_line_error(err)


def test_generate_passes_over_what_a_file_says_to_other_commands(run, tmp_path):
    (tmp_path / "all.yaml").write_text("n: 4\nlogprobs: 2\nmax_tokens: 3\nignore_eos: true\n")
    status, _, err = run("generate", "abc", "MODEL", "--raw", "--config", tmp_path / "all.yaml")
    assert status == 0
    assert "[3 prompt and 3 output tokens;" in err


def stop_at_first_piece(monkeypatch, error):
    def stream(self, *arguments):
        yield "piece"
        raise error

    monkeypatch.setattr(LLM, "stream", stream)


def test_ctrl_c_keeps_what_was_said(run, monkeypatch):
    stop_at_first_piece(monkeypatch, KeyboardInterrupt())
    status, out, err = run("generate", "abc", "MODEL")
    assert (status, out) == (130, "piece\n")
    assert "Traceback" not in err


def test_a_reader_that_goes_away_is_no_error(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr("fineserve_jax.loaders.fetch", lambda alias: tmp_path)
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["fetch", "smollm2-135m"]) == 141
    assert capfd.readouterr().err == ""


# -- the others --------------------------------------------------------------------------------------------


def test_perplexity_says_the_same_to_people_and_programs(run, tmp_path, tiny_model):
    text = "the quick brown fox jumps over the lazy dog " * 2
    (tmp_path / "text").write_text(text)
    options = ["--weights", "fp32", "--kv-precision", "int4", "--kv-memory", "8MiB", "--max-chunk-tokens", 32]
    command = [
        "perplexity",
        "--model",
        tiny_model,
        "--text",
        tmp_path / "text",
        "--window",
        40,
        "--windows",
        2,
    ]
    status, out, err = run(*command, *options, "--json")
    assert status == 0
    assert "window 2 of 2: perplexity so far" in err
    (line,) = out.splitlines()
    result = json.loads(line)
    assert {**result, "ppl": 0, "bits_per_value": 0} == {
        "ppl": 0,
        "tokens": 78,
        "window": 40,
        "windows": 2,
        "kv_precision": "int4",
        "bits_per_value": 0,
        "model": "tiny",
        "weights": "fp32",
    }
    config = EngineConfig(
        weights="fp32",
        kv_precision="int4",
        kv_memory="8MiB",
        max_chunk_tokens=32,
        max_batch_size=1,
        max_seq_len=40,
    )
    engine = Engine(load_model(tiny_model, "fp32"), config)
    measured = measure_perplexity(engine, engine.tokenizer.encode(text), 40, 2)
    assert asdict(measured) == result
    status, out, _ = run(*command, *options)
    assert out == f"{measured}\n"
    assert f"perplexity {result['ppl']:.4f} over 78 tokens (2 windows of 40); int4 KV" in out


def test_a_text_that_is_too_short_is_refused(run, tmp_path, tiny_model):
    (tmp_path / "text").write_text("x" * 39)
    options = ["--model", tiny_model, "--kv-memory", "8MiB", "--window", 16, "--windows", 3]
    status, out, err = run("perplexity", "--text", tmp_path / "text", *options)
    assert (status, out) == (2, "")
    assert "the text has 39 tokens, which is 2 windows of 16; 3 were asked for" in one_line_error(err)


def test_convert_writes_a_model_that_can_be_used(run, tiny_model, tmp_path):
    status, out, err = run("convert", tiny_model, tmp_path / "converted", "--weights", "fp32")
    assert status == 0
    assert "converted: tiny, fp32 weights, " in out
    status, _, err = run("convert", tiny_model, tmp_path / "converted")
    assert status == 2
    assert "not an empty directory" in one_line_error(err)
    status, _, err = run("generate", "abc", "--model", tmp_path / "converted", "--weights", "int8")
    assert status == 2
    assert "holds fp32 weights, int8 was asked for" in one_line_error(err)


def test_fetch_prints_where_the_model_is(run, monkeypatch, tmp_path):
    monkeypatch.setattr("fineserve_jax.loaders.fetch", lambda alias: tmp_path / alias)
    assert run("fetch", "smollm2-135m") == (0, f"{tmp_path / 'smollm2-135m'}\n", "")


def test_fetch_names_the_aliases_there_are(run):
    status, _, err = run("fetch", "gpt-5")
    assert status == 2
    assert "known: smollm2-135m" in one_line_error(err)


@pytest.mark.parametrize("command", ["batch", "serve", "generate", "perplexity", "quality", "convert", "fetch"])
def test_help_explains_every_option(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0
    if command in ("batch", "generate", "perplexity"):
        for flag in ("--model", "--config", "--weights", "--kv-precision", "--kv-memory", "--slab-policy"):
            assert flag in out
        assert "fraction of the device" in " ".join(out.split())
    assert "(default: None)" not in out


def test_unknown_commands_and_options_are_refused(run):
    assert run("answer")[0] == 2
    assert run("batch", "-i", "a", "-o", "b", "--heat", "1")[0] == 2
    assert run()[0] == 2


def test_the_installed_program_starts(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fineserve_jax.entrypoints.cli", "generate", "x", "--config", tmp_path / "none.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert one_line_error(done.stderr).startswith("error: cannot read the configuration")
