"""Runs steps on the device: the only holder of compiled programs."""

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.narrowing import MAX_RUNS
from fineserve_jax.models import CausalLM
from fineserve_jax.models.product_choice import compiled_products
from fineserve_jax.pallas_kernels.formats import FORMATS, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.request.request import Request, SchedulerOutput, TokenScore
from fineserve_jax.runner import step as stages
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.inputs import branch_numbers, build_inputs
from fineserve_jax.runner.nonfinite import find_nonfinite
from fineserve_jax.runner.pooling import plan_pooling
from fineserve_jax.runner.programs import compile_counted
from fineserve_jax.runner.sampler import Sampled, build_sampling
from fineserve_jax.runner.scoring import ScoringPlan, empty_tile, plan_scores
from fineserve_jax.runner.shapes import StepShape, StepSpec, chunk_buckets, pick, row_buckets
from fineserve_jax.runner.token_masks import build_masks

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities, natural, at one position.

    Attributes:
        logprob: of the token that was sampled, or that stands there in the prompt.
        top: token id -> log-probability of the most likely tokens, likeliest first.
        asked: token id -> log-probability of `SamplingParams.logprob_token_ids`, in their order.
    """

    logprob: float
    top: dict[int, float]
    asked: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A request's next token; `logprobs` only if it asked for them."""

    request: Request
    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        tokens: the sampled tokens; of a request with drafts one more than there are drafts that it would have sampled
            itself, in their order.
        nonfinite: the requests for which the step computed NaN or infinity, be it for one token of a chunk; nothing is
            sampled for them. Each with the stage whose output was the first such, or None without `check_finite`.
        stuck: the requests that may sample nothing by their structured outputs, each with the reason.
        scores: of prompt tokens, those of each request in their order, as `ScheduledChunk.scored` names them.
        pooled: f64[hidden], sums of hidden states, of requests that pool them, over the tokens of the step that
            `PromptPooling.wanted` names.
        hidden: f32[tokens, hidden], for each of those what the last layer gave for the token before, of requests that
            keep it.
        waited_s: how long the host waited for the device.
    """

    tokens: list[SampledToken]
    nonfinite: dict[Request, str | None]
    stuck: dict[Request, str]
    scores: dict[Request, list[TokenScore]]
    hidden: dict[Request, np.ndarray]
    waited_s: float
    pooled: dict[Request, np.ndarray] = field(default_factory=dict)


class ModelRunner:
    """One model on the device, and a compiled program for each shape that has occurred.

    Args:
        model, params: the model and its weights; whoever puts others into the table between two steps has them used.
        geometry: of its pages.
        arena: where its pages are, beside those of other models.
        kv: the host's half of the cache.
        max_rows: most requests in a step.
        max_chunk_tokens: most prefill tokens in a step, a multiple of the page size.
        max_seq_len: most tokens of a request.
        implementation: of the kernels.
        check_finite: whether to find the stage (embedding, layer or head) that first gives NaN or infinity.
        eos_ids: the model's end-of-sequence tokens, for structured outputs.
        reproducible: whether a request's numbers are the same, bit for bit, whatever shares its steps: these are all of
            one size, and programs the same from the beginning. Steps must hold one chunk or only decode.
        formats: KV formats to serve from the beginning.
        drafts: whether decodes may have drafts, in steps without chunks.
    """

    def __init__(
        self,
        model: CausalLM,
        params: dict[str, Any],
        geometry: PageGeometry,
        arena: Arena,
        kv: KVManager,
        *,
        max_rows: int,
        max_chunk_tokens: int,
        max_seq_len: int,
        implementation: Implementation = "xla",
        check_finite: bool = False,
        eos_ids: Sequence[int] = (),
        reproducible: bool = False,
        formats: Iterable[str] = (),
        drafts: bool = False,
    ) -> None:
        self.model, self.params, self.geometry, self.arena, self.kv = model, params, geometry, arena, kv
        # Of each layer its kind, the number of its group and whether it has RoPE, and its number in the group.
        self.place_of_layer = {
            layer: ((number, layer not in model.config.no_rope_layers), jnp.int32(index))
            for number, group in enumerate(model.config.layer_groups)
            for index, layer in enumerate(group.layers)
        }
        self.max_seq_len, self.implementation, self.check_finite = max_seq_len, implementation, check_finite
        self.eos_ids = tuple(eos_ids)
        self.row_buckets = row_buckets(max_rows, single=model.weights != "fp32" and compiled_products())
        self.reproducible, self.drafts = reproducible, drafts
        if reproducible:
            self.row_buckets = self.row_buckets[-1:]
        self.chunk_buckets = chunk_buckets(max_chunk_tokens, geometry.page_size)
        self.format_names: tuple[str, ...] = ()
        self.max_runs = 1
        self.num_compilations = 0
        self.use_formats(formats)

    @property
    def layer_params(self) -> list[dict[str, Any]]:
        """The weights of each layer."""
        return [self.params[f"layers_{i}"] for i in range(self.geometry.num_layers)]

    @property
    def takes_branches(self) -> bool:
        """Whether chunks may have branches: where positions tell of nothing but rotations, and nobody asks for the
        stage at which a branch stops being finite."""
        config = self.model.config
        has_windows = any(group.window is not None for group in config.layer_groups)
        return not (has_windows or config.long_after is not None or self.reproducible or self.check_finite)

    def use_formats(self, names: Iterable[str]) -> None:
        """Makes the steps from now on serve these KV formats too, and the residuals they need.

        Programs read and write just the formats that the engine has met: each adds a loop to every layer.
        """
        wanted = {*self.format_names, *names}
        wanted |= {residual for name in wanted if (residual := get_format(name).residual)}
        self.format_names = tuple(name for name in FORMATS if name in wanted)

    def use_narrowing(self) -> None:
        """Makes the steps from now on serve requests with pages in several formats."""
        self.max_runs = MAX_RUNS

    def warm_up(self, structured_outputs: bool = False, prompt_logprobs: bool = False) -> int:
        """Compiles all shapes that steps of the formats in use can take; returns how many programs that took.

        Args:
            structured_outputs: also for steps in which some request may not sample any token.
            prompt_logprobs: also for steps in which prompt tokens are scored.
        """
        before = self.num_compilations
        shapes = [StepShape(rows, 0) for rows in self.row_buckets]
        shapes += [StepShape(self.row_buckets[-1], chunk) for chunk in self.chunk_buckets]
        empty = SchedulerOutput((), ())
        for shape in shapes:
            scored = prompt_logprobs and shape.chunk_tokens > 0
            self._run(self._spec(shape), empty, scored=scored)
            if scored and self.takes_branches:
                self._run(self._spec(shape), empty, branched=True)
            if structured_outputs:
                self._run(self._spec(shape), empty, masked=True)
        return self.num_compilations - before

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Computes a step; its keys and values are in the arena when this returns.

        What the KV manager has queued for the device must have been done.
        """
        return self._run(self._spec(self._shape(output)), output)

    def _shape(self, output: SchedulerOutput) -> StepShape:
        page_size = self.geometry.page_size
        slots = sum(-(-scheduled.num_slots // page_size) * page_size for scheduled in output.prefills)
        if not slots:
            return StepShape(pick(self.row_buckets, output.num_decode_rows), 0)
        return StepShape(self.row_buckets[-1], pick(self.chunk_buckets, slots))

    def _spec(self, shape: StepShape) -> StepSpec:
        max_pages = -(-self.max_seq_len // self.geometry.page_size)
        return StepSpec(
            self.model,
            self.geometry,
            self.format_names,
            shape,
            max_pages,
            self.max_runs,
            self.implementation,
            packs=not self.reproducible,
            drafts=self.drafts and shape.rows > 1 and not shape.chunk_tokens,
        )

    def _run(
        self,
        spec: StepSpec,
        output: SchedulerOutput,
        masked: bool = False,
        scored: bool = False,
        branched: bool = False,
    ) -> StepResult:
        """Computes a step. `masked`: with masks of tokens even if no request needs them; `scored`: also a tile that
        scores nothing; `branched`: as if there were branches."""
        host_inputs, requests = build_inputs(spec, output, self.kv)
        numbers = np.zeros(spec.shape.chunk_tokens, np.int32) if branched else branch_numbers(spec, output)
        programs = _programs(spec)
        compiled_before = programs.num_compiled
        host_sampling = build_sampling(requests, spec.shape.rows, self.max_seq_len, _drafts_ahead(output))
        inputs, sampling, branches = jax.device_put((host_inputs, host_sampling, numbers))
        start = time.perf_counter()
        stream = programs.embed(self.params, inputs)
        words, checks = [], [programs.finite_slots(stream)] if self.check_finite else []
        for index, params in enumerate(self.layer_params):
            kind, number = self.place_of_layer[index]
            stream, encoded = programs.layers[kind](params, stream, number, self.arena.units, inputs, branches)
            words.append(encoded)
            if self.check_finite:
                checks.append(programs.finite_slots(stream))
        # The layers are being computed while the host finds out what may be sampled.
        always = masked or self.reproducible  # with masks the head is another program
        masks = build_masks(requests, spec.shape.rows, self.model.config.vocab_size, self.eos_ids, always)
        allowed, stuck = (None, {}) if masks is None else (jax.device_put(masks.allowed), masks.stuck)
        outputs = programs.head(self.params, stream, inputs, sampling, allowed)
        plan = ScoringPlan([], [empty_tile(spec)]) if scored else plan_scores(spec, output)
        tiles = [programs.score(self.params, stream, tile) for tile in plan.tiles]
        kept = [programs.hidden(stream, tile.slots) for tile in plan.tiles] if plan.keeps_hidden else []
        pooling = plan_pooling(spec, output)
        sums = None if pooling is None else programs.pool(self.params, stream, pooling.owners)
        self.arena.units = programs.commit(self.arena.units, words, inputs)
        waiting = time.perf_counter()
        (sampled, finite), tiles, kept, checked, sums = jax.device_get((outputs, tiles, kept, checks, sums))
        waited_s = time.perf_counter() - waiting
        compilations = programs.num_compiled - compiled_before
        self.num_compilations += compilations
        if compilations:
            seconds = time.perf_counter() - start
            log.info("compiled %s for %s in %.1f s", spec.shape, "+".join(spec.format_names), seconds)
        tokens, finite_logits = _accepted(output, _collect(requests, sampled), finite, sampled.finite)
        scores = plan.collect(tiles)
        for request, own in scores.items():
            if request.branches:
                continue  # what is wrong with one is no reason to lose the others
            finite_logits[request] = all(math.isfinite(s.logprob) for s in own) and finite_logits.get(request, True)
        nonfinite = find_nonfinite(spec, output, finite_logits, finite, checked)
        stuck = {request: reason for request, reason in stuck.items() if request not in nonfinite}
        if ended := nonfinite.keys() | stuck.keys():
            tokens = [token for token in tokens if token.request not in ended]
        pooled = {} if pooling is None else pooling.collect(sums)
        return StepResult(tokens, nonfinite, stuck, scores, plan.collect_hidden(kept), waited_s, pooled)


@functools.cache
def _programs(spec: StepSpec) -> "_Programs":
    """The programs of a spec; engines of one model share them."""
    return _Programs(spec)


class _Programs:
    """The jitted stages of steps of one spec.

    Attributes:
        num_compiled: how many programs were compiled, or loaded from JAX's compilation cache.
        layers: a layer of each group, with RoPE and without.
    """

    def __init__(self, spec: StepSpec) -> None:
        self.num_compiled = 0

        def compiled(stage: Callable[..., Any], *static: int, donate_argnums: Sequence[int] = ()) -> Callable[..., Any]:
            return compile_counted(functools.partial(stage, spec, *static), self._count, donate_argnums)

        self.embed, self.head = compiled(stages.embed), compiled(stages.head)
        kinds = itertools.product(range(len(spec.groups)), (True, False))
        self.layers = {kind: compiled(stages.layer, *kind) for kind in kinds}
        self.hidden, self.pool = compiled(stages.hidden), compiled(stages.pool)
        self.score, self.commit = compiled(stages.score), compiled(stages.commit, donate_argnums=(0,))
        self.finite_slots = compiled(stages.finite_slots)  # a program only where `check_finite` asks for it

    def _count(self) -> None:
        self.num_compiled += 1


def _drafts_ahead(output: SchedulerOutput) -> list[tuple[int, ...]]:
    """Of each sampled row, in their order, the drafts that it follows."""
    chunks = (chunk for chunk in output.chunks if chunk.samples)
    return [chunk.drafts[:count] for chunk in chunks for count in range(len(chunk.drafts) + 1)]


def _accepted(
    output: SchedulerOutput, tokens: Sequence[SampledToken], finite_slots: np.ndarray, finite_logits: np.ndarray
) -> tuple[list[SampledToken], dict[Request, bool]]:
    """What was sampled, of drafts only behind those that are what was sampled in their place, so that each token is
    the one that decoding token by token gives. Where a draft's row is not finite, what is ahead of it stands, and the
    next step computes it again.

    Args:
        tokens: of each sampled row, in their order.
        finite_slots: bool[N], see `step.finite_slots`.
        finite_logits: bool[S], of each sampled row.

    Returns:
        the tokens, and of each sampled request whether the logits of the first are finite.
    """
    kept, finite, row = [], {}, 0
    for chunk in output.chunks:
        if not chunk.samples:
            continue
        kept.append(tokens[row])
        finite[chunk.request] = bool(finite_logits[row])
        for place, draft in enumerate(chunk.drafts, row):
            is_finite = finite_slots[place + 1] and finite_logits[place + 1]  # decodes are sampled row by row
            if tokens[place].token != draft or not is_finite:
                break
            kept.append(tokens[place + 1])
        row += 1 + len(chunk.drafts)
    return kept, finite


def _collect(requests: Sequence[Request], sampled: Sampled) -> list[SampledToken]:
    tokens = []
    for i, request in enumerate(requests):
        logprobs, sampling = None, request.sampling
        if sampling.gives_logprobs:
            wanted, asked = sampling.logprobs or 0, sampling.logprob_token_ids
            top = zip(sampled.top_ids[i, :wanted].tolist(), sampled.top_logprobs[i, :wanted].tolist(), strict=True)
            of_asked = zip(asked, sampled.asked_logprobs[i, : len(asked)].tolist(), strict=True)
            logprobs = TokenLogprobs(float(sampled.logprobs[i]), dict(top), dict(of_asked))
        tokens.append(SampledToken(request, int(sampled.tokens[i]), logprobs))
    return tokens
