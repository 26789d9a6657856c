"""Answers in the form of OpenAI's batch API: {"id", "custom_id", "response", "error"}, as its reference has them.

A `response` has `status_code`, `request_id` and, as `body`, what the endpoint would have sent: a chat completion, a
completion, or {"error": ...} for a row that could not be answered, whose `error` says the same.
"""

import hashlib
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.entrypoints.batch.row_ids import RowId
from fineserve_jax.entrypoints.openai_api.answers import STATUS, completion_body, error_body
from fineserve_jax.entrypoints.openai_api.fields import Form
from fineserve_jax.entrypoints.openai_api.logprobs import Echo, Entries


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
    form: Form,
    name: AnswerName,
    output: RequestOutput,
    entries: Sequence[Entries | None],
    used: dict[str, Any],
    echo: Echo,
    callable_names: Collection[str] = (),
) -> dict[str, Any]:
    """The answer to a request.

    Args:
        form: of its endpoint.
        entries: log-probabilities of each sample.
        used: further fields of the body.
        echo: the prompt.
        callable_names: functions that the model could call.
    """
    token = name.token()
    body = {**completion_body(form, token, name.created, [output], [entries], [echo], callable_names), **used}
    return _line(name, token, 200, body, None)


def openai_error(name: AnswerName, message: str, code: str, place: dict[str, Any]) -> dict[str, Any]:
    """What is written of a request that cannot be answered. `place`: its line, and its file if there are several."""
    status = STATUS.get(code, 400)
    error = {"code": code, "message": message, **place}
    return _line(name, name.token(), status, error_body(message, code, status), error)


def _line(
    name: AnswerName, token: str, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{token}", "body": body}
    return {"id": f"batch_req_{token}", "custom_id": name.custom_id, "response": response, "error": error}
