"""The asynchronous front door: prompts in and answers out for asyncio's tasks, which no step holds up."""

import asyncio
import contextlib
import weakref
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack

from fineserve_jax.engine.async_loop import AsyncLoop
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.intake import Conversation, Encode, Prompt, chat_encoder, ticket_for_pieces, tickets_of_all
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.prompts import conversation_list, encode_prompt, prompt_list
from fineserve_jax.engine.stats import EngineStats, joint_stats
from fineserve_jax.fleet import Plan, only_engine, open_engines
from fineserve_jax.loaders import ChatOptions, Tokenizer
from fineserve_jax.request.request_options import OptionKeywords, RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams


class AsyncLLM:
    """A model, or several, for any number of asyncio tasks at once; they are served together.

    >>> llm = AsyncLLM("smollm2-135m", kv_memory="256MiB")
    >>> async for piece in llm.stream("The sky is", SamplingParams(max_tokens=32), kv_precision="int8"):
    ...     print(piece, end="")

    Prompts are encoded on other threads, and steps are computed on one of their own. A task that is cancelled, or that
    leaves a stream, ends its requests, and their memory is free before the next step. Options say how urgent each is.

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
        plan: str | Path | Plan | None = None,
        **settings: Any,
    ) -> None:
        self.intake, loop = open_engines(model, models, plan, settings)
        self.loop = AsyncLoop(loop)
        weakref.finalize(self, loop.close_without_waiting).atexit = False  # the loop sees to that itself

    @property
    def tokenizer(self) -> Tokenizer:
        """The only model's; those of several are in `intake.models`."""
        return self.intake.served().tokenizer

    @property
    def engine(self) -> Engine:
        """The only engine; its own methods are for the loop's thread, but for `prepare`. Raises `EngineError` if there
        are several, by a plan."""
        return only_engine(self.intake)

    async def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Answers one prompt or several; see `LLM.generate`."""
        return await self._answer(prompt_list(prompts), encode_prompt, sampling_params, options, fields)

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
        encode = chat_encoder(chat_options)
        return await self._answer(conversation_list(conversations), encode, sampling_params, options, fields)

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

    async def warm_up(
        self,
        kv_precisions: Sequence[str] = (),
        min_kv_precision: str | None = None,
        *,
        structured_outputs: bool = False,
        prompt_logprobs: bool = False,
    ) -> int:
        """Compiles ahead all programs that requests in these KV formats can need; see `Engine.warm_up`."""
        programs = await self.loop.each(
            lambda engine: engine.warm_up(
                kv_precisions,
                min_kv_precision,
                structured_outputs=structured_outputs,
                prompt_logprobs=prompt_logprobs,
            )
        )
        return sum(programs)

    async def load_model(self, name: str, source: str | Path | Mapping[str, Any]) -> None:
        """Serves a further model out of the same KV memory; see `LLM.load_model`."""
        await self.loop.load_model(name, source)

    async def unload_model(self, name: str, *, abort: bool = False) -> None:
        """Serves a model no longer; see `LLM.unload_model`."""
        await self.loop.unload_model(name, abort=abort)

    async def stats(self) -> EngineStats:
        """Where the engine stands between two steps; see `LLM.stats`."""
        return joint_stats(await self.loop.each(Engine.stats))

    async def close(self) -> None:
        """Ends the thread that computes; whoever waits, and later calls, get an `EngineError`."""
        await self.loop.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def _answer(
        self,
        prompts: Sequence[Any],
        encode: Encode,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: RequestOptions | Sequence[RequestOptions] | None,
        fields: OptionKeywords,
    ) -> list[RequestOutput]:
        self.loop.check_usable()
        inbox = self.loop.inbox()
        tickets = await asyncio.to_thread(
            tickets_of_all, self.intake, inbox, prompts, encode, sampling_params, options, fields
        )
        return await self.loop.outputs(inbox, tickets)
