"""Vectors of texts, pooled hidden states of a model: what `LLM.embed` asks of the engine, and what it tells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.intake import Intake
from fineserve_jax.engine.prompts import encode_prompt
from fineserve_jax.engine.scoring import FOR_SCORES
from fineserve_jax.engine.tickets import Receiver, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders.pooling_settings import Pooling
from fineserve_jax.request.request_options import RequestOptions, options_of_each

POOLINGS: tuple[str, ...] = get_args(Pooling)


@dataclass(frozen=True, slots=True)
class PromptEmbedding:
    """The vector of a prompt.

    Attributes:
        token_ids: the prompt.
        vector: f32[hidden]; None where there is an error.
        error: why there is none: the model computed NaN or infinity, or steps failed.
    """

    token_ids: list[int]
    vector: np.ndarray | None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """Vectors of prompts, see `LLM.embed`; a `Call`.

    Attributes:
        prompts: one or more, in a list.
        pooling, normalize, options, fields: as of `LLM.embed`.
    """

    prompts: Sequence[Any]
    pooling: str | None
    normalize: bool | None
    options: RequestOptions | Sequence[RequestOptions] | None
    fields: Mapping[str, Any]

    def tickets(self, engine: Intake, receiver: Receiver) -> list[Ticket]:
        """One each. Raises `RequestError`, naming the first prompt that has no vector."""
        if self.pooling not in (None, *POOLINGS):
            raise RequestError(f"pooling={self.pooling!r}: choose one of {', '.join(POOLINGS)}")
        tickets = []
        option_list = options_of_each(len(self.prompts), self.options, self.fields)
        for i, (prompt, own) in enumerate(zip(self.prompts, option_list, strict=True)):
            try:
                served = engine.served(own.model)
                text, token_ids = encode_prompt(served.tokenizer, prompt, served.max_seq_len)
                first = 0 if self._pooling_of(served) == "mean" else len(token_ids) - 1
                prepared = engine.prepare(token_ids, FOR_SCORES, own, first)
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
            tickets.append(Ticket(prepared, receiver, text, i))
        return tickets

    def _pooling_of(self, served: KnownModel) -> str:
        if self.pooling is not None:
            return self.pooling
        if served.model.pooling is None:
            raise RequestError(
                f"{served.name!r} is a language model and not made for vectors: give pooling, one of "
                f"{', '.join(POOLINGS)}"
            )
        return served.model.pooling.pooling

    def _is_normalized(self, served: KnownModel) -> bool:
        settings = served.model.pooling
        return bool(settings and settings.normalize) if self.normalize is None else self.normalize

    def result(self, tickets: Sequence[Ticket]) -> list[PromptEmbedding]:
        """The vector of each prompt."""
        return [self._vector(ticket) for ticket in tickets]

    def _vector(self, ticket: Ticket) -> PromptEmbedding:
        if ticket.error is not None:
            raise ticket.error
        (request,) = ticket.samples
        pooling, token_ids = request.pooling, request.prompt_token_ids
        assert pooling is not None, "a ticket of this call asks for it"
        if request.error is not None:
            return PromptEmbedding(token_ids, None, str(request.error))
        if pooling.first + pooling.count < len(token_ids):
            reason = str(request.finish_reason)
            return PromptEmbedding(token_ids, None, f"it ended before it was computed, with the reason {reason!r}")
        vector = pooling.total / pooling.count
        if self._is_normalized(ticket.prepared.served):
            vector = vector / max(float(np.linalg.norm(vector)), np.finfo(np.float32).tiny)
        return PromptEmbedding(token_ids, vector.astype(np.float32))
