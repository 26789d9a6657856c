"""The asynchronous front door: prompts in and answers out for asyncio's tasks, which no step holds up."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, Unpack

from fineserve_jax.engine.async_loop import AsyncLoop
from fineserve_jax.engine.calls import Call, Generation
from fineserve_jax.engine.embedding import Embedding, PromptEmbedding
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.intake import Conversation, Prompt, chat_encoder, ticket_for_pieces
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.prompts import conversation_list, encode_prompt, prompt_list
from fineserve_jax.engine.scoring import Completion, CompletionScore, Scoring, completion_lists
from fineserve_jax.fleet import Fleet, Plan
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import ChatOptions, Tokenizer
from fineserve_jax.request.request_options import OptionKeywords, RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

T = TypeVar("T")
P = ParamSpec("P")


def _on_another_thread(
    method: Callable[Concatenate[LLM, P], T],
) -> Callable[Concatenate["AsyncLLM", P], Coroutine[Any, Any, T]]:
    """A method of `LLM` that waits, as one of `AsyncLLM` that is awaited."""

    async def awaited(self: "AsyncLLM", /, *arguments: P.args, **options: P.kwargs) -> T:
        return await asyncio.to_thread(method, self._llm, *arguments, **options)

    functools.update_wrapper(awaited, method)
    return awaited


class AsyncLLM:
    """A model, or several, for any number of asyncio tasks at once; they are served together.

    >>> llm = AsyncLLM("smollm2-135m", kv_memory="256MiB")
    >>> async for piece in llm.stream("The sky is", SamplingParams(max_tokens=32), kv_precision="int8"):
    ...     print(piece, end="")

    Prompts are encoded on other threads, and steps are computed on one of their own. A task that is cancelled, or that
    leaves a stream, ends its requests, and their memory is free before the next step. Options say how urgent each is.

    `warm_up`, `load_model`, `unload_model`, `update_params`, `sleep`, `wake_up`, `stats` and `close` are those of
    `LLM`, awaited; a task that is cancelled does not end them.

    Args: see `LLM`. The model is loaded here, before anything can be awaited.

    Attributes:
        intake: what is asked: the engine, or those of the plan.
        loop: what serves.

    Raises: see `LLM`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        models: Mapping[str, Any] | None = None,
        plan: str | Path | Plan | Fleet | None = None,
        **settings: Any,
    ) -> None:
        self._llm = LLM(model, models=models, plan=plan, **settings)
        self.intake = self._llm.intake
        self.loop = AsyncLoop(self._llm.loop)

    @property
    def tokenizer(self) -> Tokenizer:
        """The only model's; those of several are in `intake.models`."""
        return self._llm.tokenizer

    @property
    def engine(self) -> Engine:
        """The only engine, see `LLM.engine`."""
        return self._llm.engine

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Answers one prompt or several; see `LLM.generate`."""
        return await self._served(Generation(prompt_list(prompts), encode_prompt, sampling_params, options, fields))

    async def chat(
        self,
        conversations: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        chat_options: ChatOptions | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Continues one conversation or several; see `LLM.chat`."""
        listed, encode = conversation_list(conversations), chat_encoder(chat_options)
        return await self._served(Generation(listed, encode, sampling_params, options, fields))

    async def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        chat_options: ChatOptions | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> AsyncIterator[str]:
        """Yields the answer to one prompt, or to one conversation, piece by piece; see `LLM.stream`.

        A reader that is slower than the model gets larger pieces. Errors are raised when the first piece is asked for.
        """
        inbox = self.loop.inbox()
        ticket = await asyncio.to_thread(
            ticket_for_pieces, self.intake, inbox, prompt, sampling_params, options, chat_options, fields
        )
        async with contextlib.aclosing(self.loop.texts(inbox, ticket)) as texts:
            async for piece in texts:
                yield piece

    async def score(
        self,
        prompts: Prompt | Iterable[Prompt],
        completions: Sequence[Completion] | Sequence[Sequence[Completion]],
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[list[CompletionScore]]:
        """Log-probabilities of completions that are given, each after its prompt; see `LLM.score`."""
        return await self._served(Scoring(*completion_lists(prompts, completions), options, fields))

    async def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        pooling: str | None = None,
        normalize: bool | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[PromptEmbedding]:
        """Vectors of prompts; see `LLM.embed`."""
        return await self._served(Embedding(prompt_list(prompts), pooling, normalize, options, fields))

    warm_up = _on_another_thread(LLM.warm_up)
    load_model = _on_another_thread(LLM.load_model)
    unload_model = _on_another_thread(LLM.unload_model)
    update_params = _on_another_thread(LLM.update_params)
    sleep = _on_another_thread(LLM.sleep)
    wake_up = _on_another_thread(LLM.wake_up)
    stats = _on_another_thread(LLM.stats)
    close = _on_another_thread(LLM.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _served(self, call: Call[T]) -> T:
        """What comes of a call; whoever is cancelled meanwhile, ends it."""
        self.loop.check_usable()
        inbox = self.loop.inbox()
        tickets = await asyncio.to_thread(call.tickets, self.intake, inbox)
        await self.loop.served(inbox, tickets)
        return call.result(tickets)
