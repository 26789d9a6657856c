"""Answers in the form of OpenAI's batch API: {"id", "custom_id", "response", "error"}, as its reference has them.

A `response` has `status_code`, `request_id` and, as `body`, what the endpoint would have sent: a chat completion, a
completion, or {"error": ...} for a row that could not be answered, whose `error` says the same.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from fineserve_jax.batch.row_fields import Form
from fineserve_jax.batch.row_ids import RowId
from fineserve_jax.engine.outputs import CompletionOutput, RequestOutput

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, as in OpenAI's API, whose log-probabilities are never null."""

STATUS = {"engine_fault": 500, "internal_error": 500, "not_finite": 500, "dead_end": 500, "late": 408}  # else 400
Entries = list[dict[str, Any]] | None
"""Log-probabilities of a sample's tokens, as plain answers have them."""


class AnswerName(NamedTuple):
    """By what an answer is known.

    Attributes:
        custom_id: its row's; or what stands for it in a row without.
        seq: its row's place.
        created: when the job began, in seconds of Unix time.
    """

    custom_id: RowId
    seq: int
    created: int

    def token(self) -> str:
        """24 hexadecimal digits that another row, or another job, does not have."""
        return hashlib.blake2b(repr(tuple(self)).encode(errors="replace"), digest_size=12).hexdigest()


class Echo(NamedTuple):
    """What is told of a prompt.

    Attributes:
        text: its text.
        entries: log-probabilities of its tokens, where the first has none; None: none were asked for.
        is_wanted: whether answers begin with it.
    """

    text: str
    entries: Entries
    is_wanted: bool


def openai_answer(
    form: Form, name: AnswerName, output: RequestOutput, entries: Sequence[Entries], used: dict[str, Any], echo: Echo
) -> dict[str, Any]:
    """The answer to a request.

    Args:
        form: of its endpoint.
        entries: log-probabilities of each sample.
        used: further fields of the body.
        echo: the prompt. Without its being wanted, log-probabilities of its tokens are a field of the body.
    """
    token, chat = name.token(), form == "chat"
    samples = zip(output.outputs, entries, strict=True)
    prompt, completion = len(output.prompt_token_ids), sum(len(sample.token_ids) for sample in output.outputs)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{token}",
        "object": "chat.completion" if chat else "text_completion",
        "created": name.created,
        "model": output.model,
        "choices": [
            _chat_choice(sample, logprobs) if chat else _text_choice(sample, logprobs, echo)
            for sample, logprobs in samples
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        **({} if echo.is_wanted or echo.entries is None else {"prompt_logprobs": echo.entries}),
        **used,
    }
    return _line(name, token, 200, body, None)


def openai_error(name: AnswerName, message: str, code: str, place: dict[str, Any]) -> dict[str, Any]:
    """What is written of a request that cannot be answered. `place`: its line, and its file if there are several."""
    status = STATUS.get(code, 400)
    kind = "server_error" if status == 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return _line(name, name.token(), status, body, {"code": code, "message": message, **place})


def _line(
    name: AnswerName, token: str, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{token}", "body": body}
    return {"id": f"batch_req_{token}", "custom_id": name.custom_id, "response": response, "error": error}


def _chat_choice(sample: CompletionOutput, entries: Entries) -> dict[str, Any]:
    logprobs = None if entries is None else {"content": [_chat_entry(entry) for entry in entries], "refusal": None}
    message = {"role": "assistant", "content": sample.text, "refusal": None}
    return {
        "index": sample.index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": sample.finish_reason,
    }


def _chat_entry(entry: dict[str, Any]) -> dict[str, Any]:
    asked = [_token(other) for other in entry.get("asked", ())]
    top = [_token(other) for other in entry.get("top", ())]
    return _token(entry) | {"top_logprobs": top} | ({"asked_logprobs": asked} if asked else {})


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["text"], "logprob": _logprob(entry), "bytes": entry["bytes"]}


def _logprob(entry: dict[str, Any]) -> float:
    return MIN_LOGPROB if entry["logprob"] is None else entry["logprob"]


def _text_choice(sample: CompletionOutput, entries: Entries, echo: Echo) -> dict[str, Any]:
    return {
        "index": sample.index,
        "text": echo.text + sample.text,
        "logprobs": _text_logprobs(entries, echo),
        "finish_reason": sample.finish_reason,
    }


def _text_logprobs(entries: Entries, echo: Echo) -> dict[str, Any] | None:
    """Of the tokens of the answer, and before them of the prompt where it is echoed; None: none were asked for."""
    of_prompt = (echo.entries or []) if echo.is_wanted else []
    if entries is None and not of_prompt:
        return None
    # A token that was put before the prompt's text has no place in it.
    shift = max(0, sum(len(entry["text"]) for entry in of_prompt) - len(echo.text)) if of_prompt else 0
    every = [*of_prompt, *(entries or [])]
    starts = [-shift]
    for entry in every:
        starts.append(starts[-1] + len(entry["text"]))
    logprobs: list[float | None] = [_logprob(entry) for entry in every]
    tops: list[dict[str, float] | None] = [_by_text(entry, "top") for entry in every]
    if of_prompt:
        logprobs[0] = tops[0] = None
    written = {
        "tokens": [entry["text"] for entry in every],
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": [max(0, start) for start in starts[:-1]],
    }
    if any("asked" in entry for entry in every):
        written["asked_logprobs"] = [_by_text(entry, "asked") for entry in every]
    return written


def _by_text(entry: dict[str, Any], name: str) -> dict[str, float]:
    return {other["text"]: _logprob(other) for other in entry.get(name, ())}
