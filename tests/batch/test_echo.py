"""Rows whose answers begin with their prompts, and rows that want log-probabilities of these."""

import pytest
from job_cases import GREEDY, OnStep, by_id, run_job, written
from openai.types import Completion

from fineserve_jax import SamplingParams
from fineserve_jax.entrypoints.batch.records import Record
from fineserve_jax.entrypoints.batch.rows import BadRow, parse_row
from fineserve_jax.entrypoints.openai_api.logprobs import Echo, text_logprobs

PROMPT = "What the model adds to this prompt"


@pytest.fixture
def answers(engine, tmp_path):
    """The answers to rows, by id or custom_id."""

    def run(*rows, **options):
        run_job(engine, rows, tmp_path / "answers.jsonl", GREEDY, **options)
        found = written(tmp_path / "answers.jsonl")
        return {row["custom_id"]: row["response"]["body"] for row in found} if "response" in found[0] else by_id(found)

    return run


@pytest.fixture(scope="module")
def scores(engine):
    """Log-probabilities of the prompt's tokens but the first, and of the six that follow, as the engine gives them."""
    sampling = SamplingParams(**GREEDY, prompt_logprobs=0, logprobs=0)
    (request,) = engine.queue(engine.prepare(engine.tokenizer.encode(PROMPT), sampling))
    while engine.has_unfinished:
        engine.step()
    engine.release(request)
    return [entry.logprob for entry in (*request.scores.entries, *request.logprobs)]


def completion(name, **body):
    body = {"prompt": PROMPT, "temperature": 0} | body
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def test_a_plain_answer_begins_with_its_prompt(answers, engine, scores):
    tokens = engine.tokenizer.encode(PROMPT)
    rows = answers(
        {"id": "plain", "prompt": PROMPT},
        {"id": "echo", "prompt": PROMPT, "echo": True, "logprobs": 2},
        {"id": "tokens", "prompt": tokens, "echo": True},
        {"id": "scored", "prompt": PROMPT, "prompt_logprobs": 0, "max_tokens": 0},
        {"id": "samples", "prompt": PROMPT, "echo": True, "n": 2},
    )
    added = rows["plain"]["text"]
    assert rows["echo"]["text"] == rows["tokens"]["text"] == PROMPT + added
    assert [sample["text"] for sample in rows["samples"]["samples"]] == [PROMPT + added] * 2
    of_prompt = rows["echo"]["prompt_logprobs"]
    assert "".join(entry["text"] for entry in of_prompt) == PROMPT
    assert of_prompt[0]["logprob"] is None
    assert [len(entry.get("top", ())) for entry in of_prompt] == [0, *[2] * (len(tokens) - 1)]
    found = [entry["logprob"] for entry in (*of_prompt[1:], *rows["echo"]["logprobs"])]
    assert found == pytest.approx(scores, abs=1e-3)
    assert (rows["scored"]["text"], rows["scored"]["output_tokens"]) == ("", 0)
    assert rows["scored"]["finish_reason"] == "length"
    assert [entry["logprob"] for entry in rows["scored"]["prompt_logprobs"]][1:] == pytest.approx(
        scores[: len(tokens) - 1], abs=1e-3
    )
    for name in ("plain", "tokens", "samples"):
        assert "prompt_logprobs" not in rows[name]


def test_a_completion_with_echo_is_one_to_openais_client(answers, scores):
    rows = answers(
        completion("both", echo=True, logprobs=1, max_tokens=6, ignore_eos=True),
        completion("prompt", echo=True, logprobs=1, max_tokens=0),
        completion("text", echo=True, max_tokens=2),
        completion("silent", echo=False, logprobs=1, max_tokens=2),
    )
    texts = {name: body["choices"][0]["text"] for name, body in rows.items()}
    for name in ("text", "silent"):
        Completion.model_validate(rows[name], strict=True)
    both, prompt = (rows[name]["choices"][0]["logprobs"] for name in ("both", "prompt"))
    assert (texts["prompt"], texts["text"]) == (PROMPT, texts["both"][: len(PROMPT) + 2])
    assert "".join(both["tokens"]) == texts["both"]
    assert both["token_logprobs"][0] is both["top_logprobs"][0] is None
    assert both["token_logprobs"][1:] == pytest.approx(scores, abs=1e-3)
    assert prompt["token_logprobs"][1:] == pytest.approx(scores[: len(PROMPT) - 1], abs=1e-3)
    assert both["text_offset"] == list(range(len(PROMPT) + 6))
    assert [len(top) for top in both["top_logprobs"][1:]] == [1] * (len(PROMPT) + 5)
    assert rows["text"]["choices"][0]["logprobs"] is None
    assert len(rows["silent"]["choices"][0]["logprobs"]["tokens"]) == 2
    assert rows["prompt"]["usage"]["completion_tokens"] == 0
    # The type of OpenAI's client knows no null, which its API gives for a first token.
    both["token_logprobs"][0], both["top_logprobs"][0] = 0.0, {}
    Completion.model_validate(rows["both"], strict=True)


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_job_that_is_interrupted_tells_the_same_of_prompts(engine, tmp_path, answers, scores, stop_at):
    row, steps = {"id": 1, "prompt": PROMPT, "echo": True, "logprobs": 0, "n": 2}, []

    def stop(summary):
        steps.append(summary)
        if len(steps) == stop_at:
            raise KeyboardInterrupt

    summary = run_job(engine, [row], tmp_path / "answers.jsonl", GREEDY, observers=[OnStep(stop)])
    assert summary.interrupted
    found = answers(row, resume=True)[1]
    logprobs = [*found["prompt_logprobs"][1:], *found["samples"][0]["logprobs"]]
    assert [entry["logprob"] for entry in logprobs] == pytest.approx(scores, abs=1e-3)
    assert [len(sample["logprobs"]) for sample in found["samples"]] == [6, 6]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}], "echo": True}, "echo=True is for a prompt"),
        ({"prompt": "a", "echo": 1}, "echo=1 is neither true nor false"),
    ],
)
def test_an_echo_that_cannot_be_is_refused(fields, error):
    row = parse_row(Record(1, fields))
    assert isinstance(row, BadRow)
    assert error in row.error


def test_the_first_token_that_a_tokenizer_adds_has_no_place_in_the_text():
    """LLMs with a leading <s>, which a prompt's text does not have."""

    def entry(text, logprob=-1.0):
        return {"text": text, "logprob": logprob}

    found = text_logprobs([entry("c")], Echo("ab", [entry("<s>", None), entry("a"), entry("b")], True))
    assert found["text_offset"] == [0, 0, 1, 2]
    assert found["token_logprobs"] == [None, -1.0, -1.0, -1.0]
