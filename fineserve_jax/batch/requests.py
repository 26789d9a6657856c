"""From a row to what the engine is asked: a pure function of the row, the model's tokenizer and the job's defaults."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.batch.openai_rows import API_DEFAULTS
from fineserve_jax.batch.rows import BatchRow, Remembered
from fineserve_jax.engine.checks import most_prompt_tokens
from fineserve_jax.loaders import Tokenizer, encode_chat
from fineserve_jax.request_options import RequestOptions
from fineserve_jax.sampling_params import SamplingParams, own_fields


class RowRequest(NamedTuple):
    """What `Engine.prepare` takes."""

    token_ids: list[int]
    sampling: SamplingParams
    options: RequestOptions


class RowRequests:
    """Makes requests of rows.

    Args:
        defaults: fields of `SamplingParams` for rows that do not set them.
        seed: with a row's place makes the seed of one that has none, so that its answer does not depend on what was
            answered before it.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        own = own_fields(defaults or {})
        self._defaults = {form: {**fields, **own} for form, fields in API_DEFAULTS.items()}
        self._seed = seed
        self._sampling = Remembered(SamplingParams)

    def request(self, row: BatchRow, tokenizer: Tokenizer, max_seq_len: int | None = None) -> RowRequest:
        """The request that a row is. `max_seq_len`: of its model, for prompts that are far too long; None: none is.

        Raises `RequestError`.
        """
        sampling = self.sampling(row)
        max_tokens = None if max_seq_len is None else most_prompt_tokens(max_seq_len, sampling)
        if sampling.seed is None and sampling.temperature:
            seed = int(np.random.SeedSequence((self._seed, *_place(row))).generate_state(1)[0])
            sampling = sampling.model_copy(update={"seed": seed})
        return RowRequest(prompt_tokens(row, tokenizer, max_tokens), sampling, row.options)

    def sampling(self, row: BatchRow) -> SamplingParams:
        """How to sample the row: its own fields over the defaults, null for a field's own default.

        With `echo`, `logprobs` are wanted of the prompt, too.

        Raises:
            RequestError: values that cannot be honoured.
        """
        fields = {**self._defaults[row.form], **own_fields(row.sampling)}
        seed = fields.pop("seed", None)
        if row.echo and fields.get("prompt_logprobs") is None:
            fields["prompt_logprobs"] = fields.get("logprobs")
        sampling: SamplingParams = self._sampling(fields)
        return sampling if seed is None else sampling.model_copy(update={"seed": SamplingParams(seed=seed).seed})


def _place(row: BatchRow) -> tuple[int, ...]:
    return (row.line, row.file) if row.file else (row.line,)


def prompt_tokens(row: BatchRow, tokenizer: Tokenizer, max_tokens: int | None = None) -> list[int]:
    """The row's prompt as token ids. Raises `RequestError`. `max_tokens`: see `Tokenizer.encode`."""
    if row.messages is not None:
        _, token_ids = encode_chat(tokenizer, row.messages, row.chat, max_tokens=max_tokens)
        return token_ids
    if isinstance(row.prompt, str):
        return tokenizer.encode_prompt(row.prompt, max_tokens)
    return list(row.prompt or ())
