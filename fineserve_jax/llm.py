"""The synchronous front door: prompts in, answers out, in order."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Unpack

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.model_settings import model_sources
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.engine.prompts import conversation_list, encode_prompt, is_conversation, prompt_list
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.loaders import ChatOptions, Tokenizer, encode_chat
from fineserve_jax.request import Request, RequestStatus
from fineserve_jax.request_options import OptionKeywords, RequestOptions, one_each, options_of_each
from fineserve_jax.sampling_params import SamplingParams

Prompt = str | Iterable[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]
Encode = Callable[..., tuple[str | None, list[int]]]


class LLM:
    """A model, or several, that answer prompts, each with its KV cache in the precision it asks for.

    >>> llm = LLM("smollm2-135m", kv_precision="int8", kv_memory="256MiB")
    >>> outs = llm.generate(["The sky is", "Grass is"], SamplingParams(max_tokens=8), kv_precision=["int4", "bf16"])
    >>> outs[0].outputs[0].text

    Several models share the KV memory, and then each prompt names its model:

    >>> llm = LLM(models={"exact": "smollm2-135m", "fast": {"model": "smollm2-135m", "weights": "int8"}})
    >>> llm.generate(["The sky is", "Grass is"], model=["exact", "fast"])

    Args:
        model: an alias, a .gguf file, a Hugging Face directory, or a directory that `fineserve-jax convert` wrote.
        models: instead of `model`, several by name: each such a source, or a table of `model` and, where they differ
            from the settings, `weights`, `kv_precision` and `max_seq_len`.
        settings: the fields of `EngineConfig`.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: a setting that is unknown or cannot be honoured.
    """

    def __init__(self, model: str | None = None, *, models: Mapping[str, Any] | None = None, **settings: Any) -> None:
        if (model is None) == (models is None):
            given = "neither model nor models" if model is None else "both model and models"
            raise ConfigError(f"the LLM was given {given}; give one model, or several by name as models")
        config = EngineConfig(**settings)
        self.engine = load_engine(model_sources(models) if model is None else model, config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The only model's; those of several are in `engine.models`."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        on_step: Callable[[EngineStats], None] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Answers prompts, all in one batch as far as memory allows.

        Args:
            prompts: texts, lists or arrays of token ids, or tables {"prompt": text} or {"prompt_token_ids": ids}; in a
                list or a generator; or a single one.
            sampling_params: one for all, or one for each prompt; greedy if None.
            options: who answers, in which KV precision, how soon: one for all, or one for each prompt.
            on_step: called after every step, to show progress.
            fields: of `RequestOptions`, those that `options` leaves unset: each one for all, or one for each prompt.

        Returns:
            an output for each prompt, in the order of the prompts. Where a model computed NaN or infinity, or an answer
            cannot go on as its `structured_outputs` ask, the sample's `finish_reason` is "error", and its `error` says
            more; the others go on.

        Raises:
            RequestError: before anything is computed, naming the first prompt that cannot be served.
        """
        return self._answer(prompt_list(prompts), encode_prompt, sampling_params, options, fields, on_step)

    def chat(
        self,
        conversations: Conversation | Iterable[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        options: RequestOptions | Sequence[RequestOptions] | None = None,
        *,
        chat_options: ChatOptions | None = None,
        on_step: Callable[[EngineStats], None] | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> list[RequestOutput]:
        """Continues conversations, lists of {"role": ..., "content": ...}, through the model's chat template.

        Otherwise as `generate`; also raises `RequestError` for malformed messages or a model without a template.

        Args:
            chat_options: how they are rendered: tools, documents, which template, and so on.
        """
        encode = functools.partial(encode_chat, options=chat_options or ChatOptions())
        return self._answer(conversation_list(conversations), encode, sampling_params, options, fields, on_step)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        chat_options: ChatOptions | None = None,
        **fields: Unpack[OptionKeywords],
    ) -> Iterator[str]:
        """Yields the answer to one prompt, or to one conversation, piece by piece.

        Leaving the loop early ends the request. Raises `RequestError` at once, not at the first piece, and behind the
        last piece `NonFiniteError` if the model computes NaN or infinity, or `DeadEndError` if the answer cannot go on
        as its `structured_outputs` ask.

        Args:
            chat_options: how a conversation is rendered; not for a prompt, which is taken as it is.
        """
        sampling = sampling_params or SamplingParams()
        if sampling.n != 1:
            raise RequestError(f"n={sampling.n}: one answer at a time can be streamed; use n=1, or generate()")
        (own,) = options_of_each(1, options, fields)
        is_chat = is_conversation(prompt)
        if chat_options is not None and not is_chat:
            raise RequestError("chat_options with a prompt that is no conversation: give messages, or leave them out")
        chat: Encode = functools.partial(encode_chat, options=chat_options or ChatOptions())
        encode: Encode = chat if is_chat else encode_prompt
        _, prepared = self._prepare(prompt, encode, sampling, own)
        return self._pieces(prepared)

    def warm_up(
        self,
        kv_precisions: Sequence[str] = (),
        min_kv_precision: str | None = None,
        *,
        structured_outputs: bool = False,
    ) -> int:
        """Compiles ahead all programs that requests in these KV formats, and in each model's own, can need; see
        `Engine.warm_up`."""
        return self.engine.warm_up(kv_precisions, min_kv_precision, structured_outputs=structured_outputs)

    def stats(self) -> EngineStats:
        """KV bytes per format, running and waiting requests, tokens per second, compilations, preemptions."""
        return self.engine.stats()

    def _pieces(self, prepared: PreparedRequest) -> Iterator[str]:
        # Runs from the first piece asked for: a stream that nobody reads holds nothing.
        (request,) = self.engine.queue(prepared)
        try:
            while True:
                # Steps of other calls may have moved this request on, even to its end.
                if piece := self.engine.detokenizers[request].take():
                    yield piece
                if request.error is not None:
                    raise request.error
                if request.status is RequestStatus.FINISHED:
                    return
                self.engine.step()
        finally:
            self.engine.abort(request)
            self.engine.release(request)

    def _prepare(
        self, prompt: Any, encode: Encode, sampling: SamplingParams, options: RequestOptions
    ) -> tuple[str | None, PreparedRequest]:
        """The prompt's text, if it has one, and what the engine can queue."""
        served = self.engine.served(options.model)
        text, token_ids = encode(served.tokenizer, prompt, max_tokens=served.max_seq_len - 1)
        return text, self.engine.prepare(token_ids, sampling, options)

    def _answer(
        self,
        prompts: Sequence[Any],
        encode: Encode,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        options: RequestOptions | Sequence[RequestOptions] | None,
        fields: OptionKeywords,
        on_step: Callable[[EngineStats], None] | None,
    ) -> list[RequestOutput]:
        """Prepares all prompts, then serves them to the end."""
        params = one_each(sampling_params or SamplingParams(), SamplingParams, len(prompts), "sampling_params")
        option_list = options_of_each(len(prompts), options, fields)
        texts, prepared = list[str | None](), list[PreparedRequest]()
        for i, (prompt, sampling, own) in enumerate(zip(prompts, params, option_list, strict=True)):
            try:
                text, request = self._prepare(prompt, encode, sampling, own)
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
            texts.append(text)
            prepared.append(request)
        return self._serve(texts, prepared, on_step)

    def _serve(
        self,
        texts: Sequence[str | None],
        prepared: Sequence[PreparedRequest],
        on_step: Callable[[EngineStats], None] | None,
    ) -> list[RequestOutput]:
        """Nothing stays behind in the engine, whatever happens."""
        groups: list[list[Request]] = []
        try:
            for one in prepared:
                groups.append(self.engine.queue(one))
            while any(request.status is not RequestStatus.FINISHED for group in groups for request in group):
                self.engine.step()
                if on_step is not None:
                    on_step(self.stats())
            return [self.engine.output(group, text) for text, group in zip(texts, groups, strict=True)]
        finally:
            for request in (request for group in groups for request in group):
                self.engine.abort(request)
                self.engine.release(request)
