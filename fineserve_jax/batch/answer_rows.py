"""The answer to a row, as it is written; see the package's docstring for its fields."""

import json
import math
from collections.abc import Sequence
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from fineserve_jax.batch.openai_answers import AnswerName, Echo, openai_answer, openai_error
from fineserve_jax.batch.rows import BadRow, BatchRow
from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request import FinishReason
from fineserve_jax.runner.runner import TokenLogprobs


class AnswerRows:
    """Makes answers of what the engine gives, each in the form of its row.

    Args:
        names: of the inputs, by their numbers; answers name them where there are several.
        names_model: whether answers name their model.
        timing: whether they tell how long they took.
        created: when the job began, in seconds of Unix time.
    """

    def __init__(
        self, names: Sequence[str] = (), *, names_model: bool = False, timing: bool = True, created: int = 0
    ) -> None:
        self._names, self._names_model, self._timing, self._created = names, names_model, timing, created

    def answer(self, row: BatchRow, output: RequestOutput, tokenizer: Tokenizer, attempts: int = 1) -> dict[str, Any]:
        """What is written of an answered row. `tokenizer`: of the model; `attempts`: how often the row was begun."""
        used: dict[str, Any] = {"kv_precision": output.kv_precision, "kv_tokens": output.kv_tokens}
        if self._timing:
            used["timing"] = _timing(output.metrics, attempts)
        echo = _prompt_text(row, output, tokenizer) if row.echo else ""
        if row.form == "plain":
            return answer_row(row.id, output, tokenizer, names_model=self._names_model, used=used, echo=echo)
        if any(sample.finish_reason == FinishReason.LATE for sample in output.outputs):
            return self.error(BadRow(row.line, row.id, LATE, "late", row.form, row.file))
        entries = [_entries(sample, tokenizer) for sample in output.outputs]
        of_prompt = _prompt_entries(output, tokenizer)
        return openai_answer(row.form, self._name(row), output, entries, used, Echo(echo, of_prompt, row.echo))

    def error(self, bad: BadRow) -> dict[str, Any]:
        """What is written of a row that cannot be answered."""
        place = {**({"file": self._names[bad.file]} if len(self._names) > 1 else {}), "line": bad.line}
        if bad.form == "plain":
            return {"id": bad.id, **place, "error": bad.error}
        return openai_error(self._name(bad), bad.error, bad.code, place)

    def _name(self, row: BatchRow | BadRow) -> AnswerName:
        return AnswerName(row.id, row.seq, self._created)


def _timing(metrics: RequestMetrics, attempts: int) -> dict[str, Any]:
    return {
        "queue_s": round(metrics.queue_s, 6),
        "ttft_s": round(metrics.ttft_s, 6),
        "total_s": round(metrics.total_s, 6),
        "num_preemptions": metrics.num_preemptions,
        "attempts": attempts,
    }


LATE = (
    "the answer was not there in time, and the request asked to be ended then; give a longer deadline_s, or a longer "
    "ttft_slo_s where drop_when_late is set, or leave them out"
)


UNKNOWN = TokenLogprobs(-math.inf, {})
"""Written of the first token of a prompt."""


def as_line(row: dict[str, Any]) -> bytes:
    """An answer as a line of JSON. It must hold neither NaN nor infinity, which JSON lacks: raises `ValueError`."""
    try:
        line = to_json(row)
    except PydanticSerializationError:  # an id with half a surrogate pair
        line = json.dumps(row, allow_nan=False).encode()
    if b"NaN" in line or b"Infinity" in line:  # as text, or as what raises here
        line = json.dumps(row, allow_nan=False).encode()
    return line + b"\n"


def answer_row(
    row_id: Any,
    output: RequestOutput,
    tokenizer: Tokenizer,
    names_model: bool,
    used: dict[str, Any],
    echo: str = "",
) -> dict[str, Any]:
    """The answer to a plain row. `used`: what is told of how it was made; `echo`: what its texts begin with."""
    samples = [_sample(sample, tokenizer, echo) for sample in output.outputs]
    of_prompt = _prompt_entries(output, tokenizer)
    return {
        "id": row_id,
        **(samples[0] if len(samples) == 1 else {"samples": samples}),
        **({} if of_prompt is None else {"prompt_logprobs": of_prompt}),
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": sum(len(sample.token_ids) for sample in output.outputs),
        **({"model": output.model} if names_model else {}),
        **used,
    }


def _sample(sample: CompletionOutput, tokenizer: Tokenizer, echo: str) -> dict[str, Any]:
    written: dict[str, Any] = {
        "text": echo + sample.text,
        "finish_reason": sample.finish_reason,
        "output_tokens": len(sample.token_ids),
    }
    if (entries := _entries(sample, tokenizer)) is not None:
        written["logprobs"] = entries
    return written


def _prompt_text(row: BatchRow, output: RequestOutput, tokenizer: Tokenizer) -> str:
    if isinstance(row.prompt, str):
        return row.prompt
    return tokenizer.decode(output.prompt_token_ids, skip_special_tokens=False)


def _prompt_entries(output: RequestOutput, tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    """As `_entries`, of the prompt's tokens as far as it was computed; the log-probability of the first is null."""
    if output.prompt_logprobs is None:
        return None
    tokens = zip(output.prompt_token_ids, output.prompt_logprobs, strict=False)
    return [_logprobs(tokenizer, token, entry or UNKNOWN) for token, entry in tokens]


def _entries(sample: CompletionOutput, tokenizer: Tokenizer) -> list[dict[str, Any]] | None:
    if sample.logprobs is None:
        return None
    tokens = zip(sample.token_ids, sample.logprobs, strict=True)
    return [_logprobs(tokenizer, token, entry) for token, entry in tokens]


def _logprobs(tokenizer: Tokenizer, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token,
            "text": tokenizer.decode([token], skip_special_tokens=False),
            "bytes": list(tokenizer.token_bytes(token)),
            "logprob": logprob if math.isfinite(logprob) else None,
        }

    lists = {"top": entry.top, "asked": entry.asked}
    return named(token, entry.logprob) | {
        name: [named(other, logprob) for other, logprob in table.items()] for name, table in lists.items() if table
    }
