"""From a prompt and its options to a request that can be served: all checks, and all that follows from its parameters.

A request is prepared once. What is wrong with it is known then, before it takes any place or memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fineserve_jax.engine.build import KnownModel, ServedModel
from fineserve_jax.engine.checks import check_drafts, check_memory, check_tokens, check_writes, token_list
from fineserve_jax.engine.engine_config import AUTO
from fineserve_jax.engine.precision import Precision, resolve_precision
from fineserve_jax.engine.processor_checks import check_logits_processors
from fineserve_jax.errors import ModelNotServedError, RequestError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import PromptPooling, PromptScores, Request, RequestTimes
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.matcher import TokenMatcher
from fineserve_jax.scheduler.quotas import Quotas

Known = TypeVar("Known", bound=KnownModel)


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A prompt that the engine can answer, with `sampling.n` samples.

    Attributes:
        served: the model that answers.
        token_ids: the prompt.
        sampling, options: as they were asked for.
        precision: of its keys and values.
        max_total_tokens: length at which a sample ends: the lesser of prompt plus `max_tokens` and `max_seq_len`.
        stop_ids: tokens that end a sample: the model's end-of-sequence tokens unless ignored, `stop_token_ids`, and
            special tokens that are stop strings.
        matcher: at the beginning of what `structured_outputs` ask for; None: they ask for nothing.
        scored_from: with `sampling.prompt_logprobs`, index of the first token that they are wanted of.
        branches: see `Request`.
        pooled_from: index of the first token whose hidden states are pooled, with none scored; None: none are.
        arrival_s: when it came to another engine, which gave it away, by the clock of both; None: it comes when it is
            queued.
    """

    served: KnownModel
    token_ids: list[int]
    sampling: SamplingParams
    options: RequestOptions
    precision: Precision
    max_total_tokens: int
    stop_ids: frozenset[int]
    matcher: TokenMatcher | None = None
    scored_from: int = 1
    branches: tuple[tuple[int, ...], ...] = ()
    pooled_from: int | None = None
    arrival_s: float | None = None

    def request(
        self,
        request_id: str,
        sequence: int,
        arrival_s: float,
        engine_seed: int,
        sample_index: int = 0,
        fork_of: Request | None = None,
    ) -> Request:
        """One of its samples, as the scheduler takes it.

        Args:
            request_id: unique in the engine.
            sequence: order of arrival in the engine.
            arrival_s: now, by the engine's clock.
            engine_seed: with `sequence`, makes the seed of a request that names none.
            sample_index: which of the prompt's samples; moves a seed that the request names.
            fork_of: another sample of the prompt, to start from its pages if they are still there.

        Raises:
            RequestError: `fork_of` is a sample of another prompt.
        """
        if fork_of is not None and (fork_of.model, fork_of.prompt_token_ids) != (self.served.name, self.token_ids):
            raise RequestError(
                f"fork_of={fork_of.request_id!r} is of another prompt or model; fork a sample of the same prompt"
            )
        num_top, pooled_from = self.sampling.prompt_logprobs, self.pooled_from
        is_first = sample_index == 0  # the prompt is the same for all samples
        is_scored = num_top is not None and is_first and pooled_from is None
        return Request(
            request_id=request_id,
            model=self.served.name,
            kv_precision=self.precision.start,
            min_kv_precision=self.precision.floor,
            sampling=self.sampling,
            token_ids=list(self.token_ids),
            num_prompt_tokens=len(self.token_ids),
            max_total_tokens=self.max_total_tokens,
            sequence=sequence,
            times=RequestTimes(arrival_s if self.arrival_s is None else self.arrival_s),
            seed=self._seed(engine_seed, sequence, sample_index),
            stop_ids=self.stop_ids,
            long_after=self.served.model.config.long_after,
            fork_of=fork_of,
            options=self.options,
            matcher=None if self.matcher is None else self.matcher.copy(),
            scores=PromptScores(self.scored_from, num_top or 0) if is_scored else None,
            branches=self.branches,
            pooling=None if pooled_from is None else PromptPooling(pooled_from),
            # What was computed for others has no hidden states.
            shares_prefix=pooled_from is None or pooled_from == len(self.token_ids) - 1,
        )

    def _seed(self, engine_seed: int, sequence: int, sample_index: int) -> int:
        """Of a sample's random numbers: its request's, or drawn from the engine's. Where answers are reproducible the
        order of arrival has no part in it, but the prompt."""
        if self.sampling.seed is not None:
            return (self.sampling.seed + sample_index) % 2**32
        own = (sample_index, *self.token_ids) if self.served.config.reproducible else (sequence,)
        return int(np.random.SeedSequence((engine_seed, *own)).generate_state(1)[0])


def prepare_request(
    models: Mapping[str, KnownModel],
    kv: KVManager,
    quotas: Quotas,
    token_ids: Sequence[int],
    sampling: SamplingParams | None = None,
    options: RequestOptions | None = None,
    pooled_from: int | None = None,
) -> PreparedRequest:
    """Checks a request and resolves its precision, once for all of its samples.

    Args:
        models: by name; `options` name one.
        kv: knows how long pages are, and what fits.
        quotas: what tenants and precisions may take.
        token_ids: the prompt.
        sampling: greedy if None.
        pooled_from: see `PreparedRequest`.

    Raises:
        RequestError: a request that can never be served, saying what is wrong and what to do.
    """
    sampling, options = sampling or SamplingParams(), options or RequestOptions()
    served = named_model(models, options.model)
    if pooled_from is None:
        check_writes(served)
    token_ids = token_list(token_ids)
    max_total_tokens = served.max_seq_len
    if sampling.max_tokens is not None:
        max_total_tokens = min(len(token_ids) + sampling.max_tokens, served.max_seq_len)
    precision = precision_of(served, kv, options.kv_precision, options.min_kv_precision, max_total_tokens)
    check_drafts(served.config, options)
    special_ids = served.tokenizer.special_ids
    stop_ids = frozenset(sampling.stop_token_ids).union(special_ids[s] for s in sampling.stop if s in special_ids)
    if not sampling.ignore_eos:
        stop_ids |= frozenset(served.tokenizer.eos_token_ids)
    check_tokens(served, token_ids, sampling, stop_ids)
    check_logits_processors(served, token_ids, sampling)
    check_memory(kv, served.name, precision.start, max_total_tokens)
    quotas.check(served.name, precision.start, options.tenant, max_total_tokens)
    matcher = matcher_of(served, sampling)
    return PreparedRequest(
        served, token_ids, sampling, options, precision, max_total_tokens, stop_ids, matcher, pooled_from=pooled_from
    )


def matcher_of(served: KnownModel, sampling: SamplingParams) -> TokenMatcher | None:
    """What keeps a text to `structured_outputs`, if there are such. Raises `RequestError` if they cannot be had."""
    if sampling.structured_outputs is None:
        return None
    return served.tokenizer.vocabulary(served.model.config.vocab_size).matcher(sampling.structured_outputs)


def named_model(models: Mapping[str, Known], name: str | None) -> Known:
    """The model of that name; None stands for the only one. Raises `RequestError`, naming those there are."""
    there = dict(models)  # which may change meanwhile
    known = ", ".join(there) or "none, until one is loaded"
    if name is None:
        if len(there) != 1:
            few = "there are several" if there else "there is none"
            raise RequestError(f"no model is named, and {few}; give model as one of {known}")
        return next(iter(there.values()))
    if name not in there:
        raise ModelNotServedError(f"model={name!r} is not served; choose one of {known}")
    return there[name]


def precision_of(
    served: KnownModel, kv: KVManager, kv_precision: str | None, min_kv_precision: str | None, num_tokens: int = 1
) -> Precision:
    """What a request's wishes come to, where None stands for the model's own; see `resolve_precision`.

    Raises:
        RequestError: a format that is not served, or narrowing where that frees nothing.
    """
    config = served.config
    name, floor = kv_precision or config.kv_precision, min_kv_precision or config.min_kv_precision
    if min_kv_precision is None and floor is not None and name not in (AUTO, config.kv_precision):
        floor = None  # the engine's floor belongs to the engine's precision
    precision = resolve_precision(kv, served.name, served.formats, name, floor, num_tokens)
    if precision.floor is not None and config.slab_policy != "elastic":
        raise RequestError(
            f"a request in {name} that may be narrowed to {precision.floor} cannot be served with "
            f"slab_policy={config.slab_policy!r}, where that frees nothing; give a fixed kv_precision"
        )
    if precision.floor is not None and config.reproducible:
        raise RequestError(
            f"the tokens of a request in {name} that may be narrowed to {precision.floor} depend on how much memory is "
            "free, and the engine is reproducible; give a fixed kv_precision"
        )
    return precision


def use_precision(served: ServedModel, kv: KVManager, precision: Precision) -> list[PageClass]:
    """Makes the model's programs serve requests of this precision; returns the classes of their pages, widest first."""
    classes = kv.ladder(served.name, precision.start, precision.floor)
    served.runner.use_formats(group.kv_format for page_class in classes for group in page_class.groups)
    if precision.floor is not None:
        served.runner.use_narrowing()
    return classes
