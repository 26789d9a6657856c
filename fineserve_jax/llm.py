"""The synchronous front door: prompts in, answers out, in order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fineserve_jax.compilation_cache import use_compilation_cache
from fineserve_jax.config import EngineConfig
from fineserve_jax.engine import Engine, EngineStats
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import encode_chat, load_model
from fineserve_jax.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fineserve_jax.request import Request, RequestStatus
from fineserve_jax.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A model that answers prompts, each with its KV cache in the precision it asks for.

    >>> llm = LLM("smollm2-135m", kv_precision="int8", kv_memory="256MiB")
    >>> outs = llm.generate(["The sky is", "Grass is"], SamplingParams(max_tokens=8), kv_precision=["int4", "bf16"])
    >>> outs[0].outputs[0].text

    Args:
        model: an alias, a .gguf file, a Hugging Face directory, or a directory that `fineserve-jax convert` wrote.
        options: the fields of `EngineConfig`.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: an option that is unknown or cannot be honoured.
    """

    def __init__(self, model: str, **options: Any) -> None:
        config = EngineConfig(**options)
        use_compilation_cache()
        self.engine = Engine(load_model(model, config.weights), config)

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_precision: str | Sequence[str] | None = None,
        on_step: Callable[[EngineStats], None] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, all in one batch as far as memory allows.

        Args:
            prompts: texts or lists of token ids; or a single one.
            sampling_params: one for all, or one for each prompt; greedy if None.
            kv_precision: KV format, one for all or one for each; the engine's if None.
            on_step: called after every step, to show progress.

        Returns:
            an output for each prompt, in the order of the prompts.

        Raises:
            RequestError: before anything is computed, naming the first prompt that cannot be served.
        """
        listed = _prompt_list(prompts)
        tokenized = [self._tokenize(prompt) for prompt in listed]
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        return self._run(texts, tokenized, sampling_params, kv_precision, on_step)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_precision: str | Sequence[str] | None = None,
        on_step: Callable[[EngineStats], None] | None = None,
    ) -> list[RequestOutput]:
        """Continues conversations, lists of {"role": ..., "content": ...}, through the model's chat template.

        Otherwise as `generate`; also raises `RequestError` for malformed messages or a model without a template.
        """
        single = conversations and isinstance(conversations[0], Mapping)
        listed: list[Any] = [conversations] if single else list(conversations)
        encoded = [encode_chat(self.tokenizer, messages) for messages in listed]
        texts, tokenized = [text for text, _ in encoded], [token_ids for _, token_ids in encoded]
        return self._run(texts, tokenized, sampling_params, kv_precision, on_step)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        kv_precision: str | None = None,
    ) -> Iterator[str]:
        """Yields the answer to one prompt, or to one conversation, piece by piece.

        Leaving the loop early ends the request. Raises `RequestError` at once, not at the first piece.
        """
        sampling = sampling_params or SamplingParams()
        if sampling.n != 1:
            raise RequestError(f"n={sampling.n}: one answer at a time can be streamed; use n=1, or generate()")
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            _, token_ids = encode_chat(self.tokenizer, prompt)  # type: ignore[arg-type]
        else:
            token_ids = self._tokenize(prompt)  # type: ignore[arg-type]
        self.engine.check(token_ids, sampling, kv_precision)
        return self._pieces(token_ids, sampling, kv_precision)

    def warm_up(self, kv_precisions: Sequence[str] = ()) -> int:
        """Compiles ahead all programs that requests in these KV formats, and in the engine's own, can need.

        Returns:
            how many programs that took. Serving those formats compiles nothing from then on.
        """
        self.engine.runner.use_formats([self.engine.config.kv_precision, *kv_precisions])
        return self.engine.runner.warm_up()

    def stats(self) -> EngineStats:
        """KV bytes per format, running and waiting requests, tokens per second, compilations, preemptions."""
        return self.engine.stats()

    def _pieces(self, token_ids: list[int], sampling: SamplingParams, kv_precision: str | None) -> Iterator[str]:
        # Runs from the first piece asked for: a stream that nobody reads holds nothing.
        request = self.engine.add_request(token_ids, sampling, kv_precision=kv_precision)
        try:
            while True:
                # Steps of other calls may have moved this request on, even to its end.
                if piece := self.engine.texts[request].take():
                    yield piece
                if request.status is RequestStatus.FINISHED:
                    return
                self.engine.step()
        finally:
            self.engine.abort(request)
            self.engine.release(request)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)

    def _run(
        self,
        texts: Sequence[str | None],
        tokenized: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        kv_precision: str | Sequence[str] | None,
        on_step: Callable[[EngineStats], None] | None,
    ) -> list[RequestOutput]:
        """Serves tokenized prompts to the end. Nothing stays behind in the engine, whatever happens."""
        count = len(tokenized)
        params = _one_each(sampling_params or SamplingParams(), SamplingParams, count, "sampling_params")
        formats = _one_each(kv_precision or self.engine.config.kv_precision, str, count, "kv_precision")
        for i, (token_ids, sampling, name) in enumerate(zip(tokenized, params, formats, strict=True)):
            try:
                self.engine.check(token_ids, sampling, name)
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
        groups: list[list[Request]] = []
        try:
            for token_ids, sampling, name in zip(tokenized, params, formats, strict=True):
                groups.append([])
                for sample in range(sampling.n):
                    added = self.engine.add_request(token_ids, sampling, kv_precision=name, sample_index=sample)
                    groups[-1].append(added)
            while any(request.status is not RequestStatus.FINISHED for group in groups for request in group):
                self.engine.step()
                if on_step is not None:
                    on_step(self.stats())
            return [request_output(self.engine, text, group) for text, group in zip(texts, groups, strict=True)]
        finally:
            for request in (request for group in groups for request in group):
                self.engine.abort(request)
                self.engine.release(request)


def request_output(engine: Engine, prompt: str | None, samples: Sequence[Request]) -> RequestOutput:
    """The output of a prompt whose samples have all finished."""
    first, times = samples[0], [request.times for request in samples]
    arrival = min(t.arrival_s for t in times)
    ended = max(t.finished_s or arrival for t in times)
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt,
        prompt_token_ids=first.token_ids[: first.num_prompt_tokens],
        kv_precision=first.kv_precision,
        outputs=[
            CompletionOutput(
                index=i,
                text=engine.texts[request].text,
                token_ids=request.output_token_ids,
                logprobs=None if request.sampling.logprobs is None else list(request.logprobs),
                finish_reason=str(request.finish_reason),
            )
            for i, request in enumerate(samples)
        ],
        metrics=RequestMetrics(
            queue_s=max(t.admitted_s or ended for t in times) - arrival,
            ttft_s=max(t.first_token_s or ended for t in times) - arrival,
            total_s=ended - arrival,
            num_preemptions=sum(request.num_preemptions for request in samples),
        ),
    )


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(value: Any, kind: type, count: int, name: str) -> list[Any]:
    """`value` for each of `count` prompts: itself repeated, or its elements."""
    if isinstance(value, kind):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise RequestError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one each")
    return values
