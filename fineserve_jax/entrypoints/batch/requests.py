"""From a row to what the engine is asked: a pure function of the row, the model's tokenizer and the job's defaults."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.engine.checks import most_prompt_tokens
from fineserve_jax.entrypoints.batch.rows import BatchRow
from fineserve_jax.entrypoints.openai_api.asked import SamplingDefaults, prompt_tokens
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams


class RowRequest(NamedTuple):
    """What `Engine.prepare` takes."""

    token_ids: list[int]
    sampling: SamplingParams
    options: RequestOptions


class RowRequests(SamplingDefaults):
    """Makes requests of rows.

    Args:
        defaults: fields of `SamplingParams` for rows that do not set them.
        seed: with a row's place makes the seed of one that has none, so that its answer does not depend on what was
            answered before it.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__(defaults)
        self._seed = seed

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


def _place(row: BatchRow) -> tuple[int, ...]:
    return (row.line, row.file) if row.file else (row.line,)
