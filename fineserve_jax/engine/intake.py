"""From what callers give, prompts and all that goes with them, to tickets for the engine loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.checks import most_prompt_tokens
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.engine.prompts import encode_prompt, is_conversation
from fineserve_jax.engine.tickets import Receiver, Ticket
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions, Tokenizer, encode_chat
from fineserve_jax.request.request_options import RequestOptions, options_of_each
from fineserve_jax.request.sampling_params import SamplingParams

Prompt = str | Iterable[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]
Encode = Callable[..., tuple[str | None, list[int]]]
"""A tokenizer, a prompt and `max_tokens` to the prompt's text, if it has one, and its tokens."""


class Intake(Protocol):
    """What prompts are asked of: an engine, or several behind a router. `prepare` and `served` may be called by any
    thread.

    Attributes:
        models: what is served, by name; copied before somebody goes through it.
        max_batch_size: most requests that are computed at once.
        served_formats: KV formats that requests may name.
    """

    @property
    def models(self) -> Mapping[str, KnownModel]: ...

    @property
    def max_batch_size(self) -> int: ...

    @property
    def served_formats(self) -> tuple[str, ...]: ...

    def served(self, model: str | None = None) -> KnownModel:
        """See `Engine.served`."""

    def prepare(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
        pooled_from: int | None = None,
    ) -> PreparedRequest:
        """See `Engine.prepare`."""


@dataclass(frozen=True, slots=True)
class ChatEncoder:
    """Encodes conversations, through the model's chat template."""

    options: ChatOptions

    def __call__(self, tokenizer: Tokenizer, messages: Any, max_tokens: int | None = None) -> tuple[str, list[int]]:
        return encode_chat(tokenizer, messages, self.options, max_tokens)


def chat_encoder(chat_options: ChatOptions | None) -> Encode:
    """An encoder of conversations."""
    return ChatEncoder(chat_options or ChatOptions())


def prepare(
    engine: Intake, prompt: Any, encode: Encode, sampling: SamplingParams, options: RequestOptions
) -> tuple[str | None, PreparedRequest]:
    """The prompt's text, if it has one, and what the engine can queue. May be called by any thread.

    Raises:
        RequestError: a prompt that can never be served.
    """
    served = engine.served(options.model)
    if isinstance(encode, ChatEncoder):
        sampling = encode.options.constrained(sampling)
    text, token_ids = encode(served.tokenizer, prompt, max_tokens=most_prompt_tokens(served.max_seq_len, sampling))
    return text, engine.prepare(token_ids, sampling, options)


def ticket_for_pieces(
    engine: Intake,
    receiver: Receiver,
    prompt: Any,
    sampling_params: SamplingParams | None,
    options: RequestOptions | None,
    chat_options: ChatOptions | None,
    fields: Mapping[str, Any],
) -> Ticket:
    """A ticket for one prompt, or one conversation, whose text is wanted piece by piece; see `LLM.stream`.

    Raises:
        RequestError: a prompt that cannot be served, or not so.
    """
    sampling = sampling_params or SamplingParams()
    if sampling.n != 1:
        raise RequestError(f"n={sampling.n}: one answer at a time can be streamed; use n=1, or generate()")
    (own,) = options_of_each(1, options, fields)
    is_chat = is_conversation(prompt)
    if chat_options is not None and not is_chat:
        raise RequestError("chat_options with a prompt that is no conversation: give messages, or leave them out")
    text, prepared = prepare(engine, prompt, chat_encoder(chat_options) if is_chat else encode_prompt, sampling, own)
    return Ticket(prepared, receiver, text, wants_pieces=True)
