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


def openai_answer(
    form: Form, name: AnswerName, output: RequestOutput, entries: Sequence[Entries], used: dict[str, Any]
) -> dict[str, Any]:
    """The answer to a request.

    Args:
        form: of its endpoint.
        entries: log-probabilities of each sample.
        used: further fields of the body.
    """
    token, chat = name.token(), form == "chat"
    choice = _chat_choice if chat else _text_choice
    samples = zip(output.outputs, entries, strict=True)
    prompt, completion = len(output.prompt_token_ids), sum(len(sample.token_ids) for sample in output.outputs)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{token}",
        "object": "chat.completion" if chat else "text_completion",
        "created": name.created,
        "model": output.model,
        "choices": [choice(sample, logprobs) for sample, logprobs in samples],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
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
    return _token(entry) | {"top_logprobs": [_token(other) for other in entry.get("top", ())]}


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["text"], "logprob": _logprob(entry), "bytes": entry["bytes"]}


def _logprob(entry: dict[str, Any]) -> float:
    return MIN_LOGPROB if entry["logprob"] is None else entry["logprob"]


def _text_choice(sample: CompletionOutput, entries: Entries) -> dict[str, Any]:
    return {
        "index": sample.index,
        "text": sample.text,
        "logprobs": None if entries is None else _text_logprobs(entries),
        "finish_reason": sample.finish_reason,
    }


def _text_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    texts = [entry["text"] for entry in entries]
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [_logprob(entry) for entry in entries],
        "top_logprobs": [{other["text"]: _logprob(other) for other in entry.get("top", ())} for entry in entries],
        "text_offset": starts[:-1],
    }
