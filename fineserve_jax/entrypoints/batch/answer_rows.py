"""The answer to a row, as it is written; see the package's docstring for its fields."""

from collections.abc import Sequence
from typing import Any

from fineserve_jax.engine.outputs import CompletionOutput, RequestOutput
from fineserve_jax.entrypoints.batch.openai_answers import AnswerName, openai_answer, openai_error
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow
from fineserve_jax.entrypoints.openai_api.answers import LATE, timing_of
from fineserve_jax.entrypoints.openai_api.json_objects import encode_json
from fineserve_jax.entrypoints.openai_api.logprobs import Echo, echo_of, logprob_entries
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request.request import FinishReason


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
            used["timing"] = {**timing_of([output.metrics]), "attempts": attempts}
        echo = echo_of(output, row.prompt if isinstance(row.prompt, str) else None, tokenizer, row.echo)
        if row.form == "plain":
            return answer_row(row.id, output, tokenizer, self._names_model, used, echo)
        if any(sample.finish_reason == FinishReason.LATE for sample in output.outputs):
            return self.error(BadRow(row.line, row.id, LATE, "late", row.form, row.file))
        entries = [logprob_entries(tokenizer, sample.token_ids, sample.logprobs) for sample in output.outputs]
        return openai_answer(row.form, self._name(row), output, entries, used, echo, row.chat.callable_names)

    def error(self, bad: BadRow) -> dict[str, Any]:
        """What is written of a row that cannot be answered."""
        place = {**({"file": self._names[bad.file]} if len(self._names) > 1 else {}), "line": bad.line}
        if bad.form == "plain":
            return {"id": bad.id, **place, "error": bad.error}
        return openai_error(self._name(bad), bad.error, bad.code, place)

    def _name(self, row: BatchRow | BadRow) -> AnswerName:
        return AnswerName(row.id, row.seq, self._created)


def as_line(row: dict[str, Any]) -> bytes:
    """An answer as a line of JSON. It must hold neither NaN nor infinity, which JSON lacks: raises `ValueError`."""
    return encode_json(row) + b"\n"


def answer_row(
    row_id: Any, output: RequestOutput, tokenizer: Tokenizer, names_model: bool, used: dict[str, Any], echo: Echo
) -> dict[str, Any]:
    """The answer to a plain row. `used`: what is told of how it was made; `echo`: the prompt."""
    samples = [_sample(sample, tokenizer, echo.text) for sample in output.outputs]
    return {
        "id": row_id,
        **(samples[0] if len(samples) == 1 else {"samples": samples}),
        **({} if echo.entries is None else {"prompt_logprobs": echo.entries}),
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
    if (entries := logprob_entries(tokenizer, sample.token_ids, sample.logprobs)) is not None:
        written["logprobs"] = entries
    return written
