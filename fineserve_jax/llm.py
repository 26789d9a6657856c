"""The synchronous front door: prompts in, answers out, in order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import UnionType
from typing import Any

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.model_settings import model_sources
from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput, total_kv_tokens
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.loaders import Tokenizer, encode_chat
from fineserve_jax.request import Request, RequestStatus
from fineserve_jax.sampling_params import SamplingParams

Prompt = str | Sequence[int]
Conversation = Sequence[Mapping[str, Any]]


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
            from the options, `weights`, `kv_precision` and `max_seq_len`.
        options: the fields of `EngineConfig`.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: an option that is unknown or cannot be honoured.
    """

    def __init__(self, model: str | None = None, *, models: Mapping[str, Any] | None = None, **options: Any) -> None:
        if (model is None) == (models is None):
            given = "neither model nor models" if model is None else "both model and models"
            raise ConfigError(f"the LLM was given {given}; give one model, or several by name as models")
        config = EngineConfig(**options)
        self.engine = load_engine(model_sources(models) if model is None else model, config)

    @property
    def tokenizer(self) -> Tokenizer:
        """The only model's; those of several are in `engine.models`."""
        return self.engine.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_precision: str | Sequence[str | None] | None = None,
        min_kv_precision: str | Sequence[str | None] | None = None,
        model: str | Sequence[str] | None = None,
        tenant: str | Sequence[str] = "",
        on_step: Callable[[EngineStats], None] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, all in one batch as far as memory allows.

        Args:
            prompts: texts or lists of token ids; or a single one.
            sampling_params: one for all, or one for each prompt; greedy if None.
            kv_precision: KV format or "auto", one for all or one for each; the model's own if None.
            min_kv_precision: KV format to which older tokens may be narrowed when memory is short, one for all or
                one for each; None: the engine's, and with "auto" the narrowest.
            model: who answers, one name for all or one for each; None if there is only one model.
            tenant: whose the prompts are, one for all or one for each: quotas and shares are kept by it.
            on_step: called after every step, to show progress.

        Returns:
            an output for each prompt, in the order of the prompts.

        Raises:
            RequestError: before anything is computed, naming the first prompt that cannot be served.
        """
        listed = _prompt_list(prompts)
        models = self._models(model, len(listed))
        tokenized = [_tokenize(served.tokenizer, prompt) for served, prompt in zip(models, listed, strict=True)]
        texts = [prompt if isinstance(prompt, str) else None for prompt in listed]
        return self._run(models, texts, tokenized, sampling_params, kv_precision, min_kv_precision, tenant, on_step)

    def chat(
        self,
        conversations: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        kv_precision: str | Sequence[str | None] | None = None,
        min_kv_precision: str | Sequence[str | None] | None = None,
        model: str | Sequence[str] | None = None,
        tenant: str | Sequence[str] = "",
        on_step: Callable[[EngineStats], None] | None = None,
    ) -> list[RequestOutput]:
        """Continues conversations, lists of {"role": ..., "content": ...}, through the model's chat template.

        Otherwise as `generate`; also raises `RequestError` for malformed messages or a model without a template.
        """
        single = conversations and isinstance(conversations[0], Mapping)
        listed: list[Any] = [conversations] if single else list(conversations)
        models = self._models(model, len(listed))
        encoded = [encode_chat(served.tokenizer, messages) for served, messages in zip(models, listed, strict=True)]
        texts, tokenized = [text for text, _ in encoded], [token_ids for _, token_ids in encoded]
        return self._run(models, texts, tokenized, sampling_params, kv_precision, min_kv_precision, tenant, on_step)

    def stream(
        self,
        prompt: Prompt | Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        kv_precision: str | None = None,
        min_kv_precision: str | None = None,
        model: str | None = None,
        tenant: str = "",
    ) -> Iterator[str]:
        """Yields the answer to one prompt, or to one conversation, piece by piece.

        Leaving the loop early ends the request. Raises `RequestError` at once, not at the first piece.
        """
        sampling = sampling_params or SamplingParams()
        if sampling.n != 1:
            raise RequestError(f"n={sampling.n}: one answer at a time can be streamed; use n=1, or generate()")
        tokenizer = self.engine.served(model).tokenizer
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            _, token_ids = encode_chat(tokenizer, prompt)  # type: ignore[arg-type]
        else:
            token_ids = _tokenize(tokenizer, prompt)  # type: ignore[arg-type]
        how: dict[str, Any] = {
            "kv_precision": kv_precision,
            "min_kv_precision": min_kv_precision,
            "model": model,
            "tenant": tenant,
        }
        self.engine.check(token_ids, sampling, **how)
        return self._pieces(token_ids, sampling, how)

    def warm_up(self, kv_precisions: Sequence[str] = (), min_kv_precision: str | None = None) -> int:
        """Compiles ahead all programs that requests in these KV formats, and in each model's own, can need.

        Returns:
            how many programs that took. Serving those formats compiles nothing from then on.
        """
        return self.engine.warm_up(kv_precisions, min_kv_precision)

    def stats(self) -> EngineStats:
        """KV bytes per format, running and waiting requests, tokens per second, compilations, preemptions."""
        return self.engine.stats()

    def _pieces(self, token_ids: list[int], sampling: SamplingParams, how: dict[str, Any]) -> Iterator[str]:
        # Runs from the first piece asked for: a stream that nobody reads holds nothing.
        request = self.engine.add_request(token_ids, sampling, **how)
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

    def _models(self, model: str | Sequence[str] | None, count: int) -> list[ServedModel]:
        """The model of each of `count` prompts."""
        return [self.engine.served(name) for name in _one_each(model, str | None, count, "model")]

    def _run(
        self,
        models: Sequence[ServedModel],
        texts: Sequence[str | None],
        tokenized: Sequence[list[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        kv_precision: str | Sequence[str | None] | None,
        min_kv_precision: str | Sequence[str | None] | None,
        tenant: str | Sequence[str],
        on_step: Callable[[EngineStats], None] | None,
    ) -> list[RequestOutput]:
        """Serves tokenized prompts to the end. Nothing stays behind in the engine, whatever happens."""
        count = len(tokenized)
        params = _one_each(sampling_params or SamplingParams(), SamplingParams, count, "sampling_params")
        formats = _one_each(kv_precision or None, str | None, count, "kv_precision")
        floors = _one_each(min_kv_precision or None, str | None, count, "min_kv_precision")
        tenants = _one_each(tenant, str, count, "tenant")
        hows: list[dict[str, Any]] = [
            {"kv_precision": name, "min_kv_precision": floor, "model": served.name, "tenant": of}
            for name, floor, served, of in zip(formats, floors, models, tenants, strict=True)
        ]
        for i, (token_ids, sampling, how) in enumerate(zip(tokenized, params, hows, strict=True)):
            try:
                self.engine.check(token_ids, sampling, **how)
            except RequestError as error:
                raise RequestError(f"prompt {i}: {error}") from None
        groups: list[list[Request]] = []
        try:
            for token_ids, sampling, how in zip(tokenized, params, hows, strict=True):
                groups.append(self.engine.add_samples(token_ids, sampling, **how))
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
        model=first.model,
        kv_precision=first.kv_precision,
        kv_tokens=total_kv_tokens(samples),
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


def _tokenize(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    return tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else list(prompt)


def _one_each(value: Any, kind: type | UnionType, count: int, name: str) -> list[Any]:
    """`value` for each of `count` prompts: itself repeated, or its elements."""
    if isinstance(value, kind):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise RequestError(f"{name} has {len(values)} entries for {count} prompts; give one for all, or one each")
    return values
