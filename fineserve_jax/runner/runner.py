"""Runs steps on the device: the only holder of compiled programs."""

import functools
import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.narrowing import MAX_RUNS
from fineserve_jax.models import CausalLM, LayerGroup
from fineserve_jax.models.product_choice import compiled_products
from fineserve_jax.pallas_kernels.formats import FORMATS, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.request.request import SchedulerOutput
from fineserve_jax.runner.ahead import CompileAhead, num_threads
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.compilations import why_compiled
from fineserve_jax.runner.inputs import branch_numbers, build_inputs
from fineserve_jax.runner.launched import BegunStep, LaunchedStep
from fineserve_jax.runner.mesh import DeviceGroup
from fineserve_jax.runner.nonfinite import find_nonfinite
from fineserve_jax.runner.pooling import plan_pooling
from fineserve_jax.runner.processor_states import LogitsProcessing
from fineserve_jax.runner.results import StepResult, accepted, sampled_tokens
from fineserve_jax.runner.sampling_inputs import SamplingInputs, build_sampling
from fineserve_jax.runner.scoring import ScoringPlan, empty_tile, plan_scores, takes_branches
from fineserve_jax.runner.shapes import StepShape, StepSpec, chunk_buckets, pick, row_buckets
from fineserve_jax.runner.step_programs import StepPrograms, step_programs
from fineserve_jax.runner.token_masks import build_masks

log = logging.getLogger(__name__)
NOTHING = SchedulerOutput((), ())


class ModelRunner:
    """One model on the device, and a compiled program for each shape that has occurred.

    Args:
        model, params: the model and its weights; whoever puts others into the table between two steps has them used.
        geometry: of its pages; of several devices those of each.
        arena: where its pages are, beside those of other models. Its devices compute the steps.
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
        looks_ahead: whether steps may be launched behind others that are not computed.
        shares: whether decode rows attend together to cached tokens that they share, where that pays; may be changed
            between two steps.
        layer_groups: layers whose pages are apart, where KV formats differ by layer; (): the model's groups.
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
        looks_ahead: bool = False,
        shares: bool = False,
        layer_groups: tuple[LayerGroup, ...] = (),
    ) -> None:
        self.model, self.params, self.geometry, self.arena, self.kv = model, params, geometry, arena, kv
        # Of each layer its kind, the number of its group and whether it has RoPE, and its number in the group.
        self.place_of_layer = {
            layer: ((number, layer not in model.config.no_rope_layers), arena.group.put(np.int32(index)))
            for number, group in enumerate(layer_groups or model.config.layer_groups)
            for index, layer in enumerate(group.layers)
        }
        self.max_seq_len, self.implementation, self.check_finite = max_seq_len, implementation, check_finite
        self.eos_ids = tuple(eos_ids)
        self.row_buckets = row_buckets(max_rows, single=model.weights != "fp32" and compiled_products())
        self.reproducible, self.drafts, self.looks_ahead = reproducible, drafts, looks_ahead
        self.shares, self.layer_groups = shares, layer_groups
        if reproducible:
            self.row_buckets = self.row_buckets[-1:]
        self.chunk_buckets = chunk_buckets(max_chunk_tokens, geometry.page_size)
        vocab_size, most_rows = model.config.vocab_size, self.row_buckets[-1]
        self.logits_processing = LogitsProcessing(vocab_size, arena.group, most_rows, max_seq_len)
        self.format_names: tuple[str, ...] = ()
        self.max_runs = 1
        self.num_compilations = 0
        self._is_warm, self._compiled_ahead = False, list[StepSpec]()
        self._ahead: CompileAhead | None = None
        self.use_formats(formats)

    @property
    def layer_params(self) -> list[dict[str, Any]]:
        """The weights of each layer."""
        return [self.params[f"layers_{i}"] for i in range(self.geometry.num_layers)]

    @property
    def takes_branches(self) -> bool:
        """Whether chunks may have branches, see `scoring.takes_branches`."""
        return takes_branches(self.model.config, self.reproducible, self.check_finite)

    def use_formats(self, names: Iterable[str]) -> None:
        """Makes the steps from now on serve these KV formats too, and the residuals they need.

        Programs read and write just the formats that the engine has met: each adds a loop to every layer.
        """
        wanted = {*self.format_names, *names}
        wanted |= {residual for name in wanted if (residual := get_format(name).residual)}
        # In one order, however they were met, so that programs are the same; pairs and the like come last.
        self.format_names = (*(name for name in FORMATS if name in wanted), *sorted(wanted - FORMATS.keys()))

    def use_narrowing(self) -> None:
        """Makes the steps from now on serve requests with pages in several formats."""
        self.max_runs = MAX_RUNS

    def warm_up(self, structured_outputs: bool = False, prompt_logprobs: bool = False) -> int:
        """Compiles all shapes that steps of the formats in use can take; returns how many programs that took.

        Args:
            structured_outputs: also for steps in which some request may not sample any token.
            prompt_logprobs: also for steps in which prompt tokens are scored.
        """
        before, self._is_warm = self.num_compilations, False
        if self.arena.group.is_default:
            self._compile_ahead(structured_outputs, prompt_logprobs)
        self._run_all(structured_outputs, prompt_logprobs)
        jax.block_until_ready(self.arena.units)
        self._is_warm = True
        return self.num_compilations - before

    def _compile_ahead(self, structured_outputs: bool, prompt_logprobs: bool) -> None:
        """Compiles programs side by side. Those of several devices are not: what one of them would give does not tell
        how it lies on the devices."""
        units = self.arena.units
        with ThreadPoolExecutor(num_threads()) as pool:
            self._ahead = CompileAhead(pool)
            try:
                self._run_all(structured_outputs, prompt_logprobs)
                self._ahead.wait()
            finally:
                self._ahead, self.arena.units = None, units

    def _run_all(self, structured_outputs: bool, prompt_logprobs: bool) -> None:
        """Calls each program that `warm_up` compiles, in the order in which they are needed: prompts come first."""
        shapes = [StepShape(self.row_buckets[-1], chunk) for chunk in self.chunk_buckets]
        shapes += [StepShape(rows, 0) for rows in self.row_buckets]
        for spec in map(self._spec, shapes):
            scored = prompt_logprobs and spec.shape.chunk_tokens > 0
            step = self.finish(self._begin(spec, NOTHING), scored=scored)
            if scored and self.takes_branches:
                self._begin(spec, NOTHING, branched=True)
            if structured_outputs:
                self.finish(self._begin(spec, NOTHING), masked=True)
            if self.looks_ahead and not spec.shape.chunk_tokens:
                self._begin(spec, NOTHING, step)
            if any(spec.may_share(group) for group in spec.groups):
                self._begin(spec, NOTHING, shared=True)
            self._compiled_ahead.append(spec)

    def execute(self, output: SchedulerOutput) -> StepResult:
        """Computes a step; its keys and values are in the arena when this returns.

        What the KV manager has queued for the device must have been done.
        """
        return self.collect(self.launch(output))

    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Calls all programs of a step, and waits for none of them; see `execute`."""
        return self.finish(self.begin(output))

    def begin(self, output: SchedulerOutput, behind: LaunchedStep | None = None) -> BegunStep:
        """Calls a step's embedding and its layers. Only what `launch` has called may be on the device before them.

        Args:
            behind: a step that may not be computed yet. It samples the tokens, for all requests of this one, that this
                one computes; they are taken on the device. This one must fit (`follows`).
        """
        return self._begin(self._spec(self._shape(output)), output, behind)

    def follows(self, output: SchedulerOutput, behind: LaunchedStep) -> bool:
        """Whether a step can take the tokens that another one samples, on the device: it has as many rows."""
        return self._shape(output).rows == behind.step.spec.shape.rows

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
            shares=self.shares,
            mesh=self.arena.group.mesh,
            layer_groups=self.layer_groups,
        )

    def _begin(
        self,
        spec: StepSpec,
        output: SchedulerOutput,
        behind: LaunchedStep | None = None,
        *,
        shared: bool = False,
        branched: bool = False,
    ) -> BegunStep:
        """`shared`, `branched`: as if rows shared what they attend to, as if there were branches."""
        host_inputs, rows = build_inputs(spec, output, self.kv, shared=shared)
        numbers = np.zeros(spec.shape.chunk_tokens, np.int32) if branched else branch_numbers(spec, output)
        programs, words, checks = self._programs_of(spec), [], []
        with self._noting_compilations(spec, programs):
            sources = None if behind is None else behind.rows_of(output.decodes, spec.shape.rows)
            inputs, sources, branches = programs.put(self.arena.group, (host_inputs, sources, numbers))
            if behind is not None:
                tokens = programs.take_tokens(inputs.decode.tokens, behind.outputs[0].tokens, sources)
                inputs = inputs._replace(decode=inputs.decode._replace(tokens=tokens))
            stream = programs.embed(self.params, inputs)
            if self.check_finite:
                checks.append(programs.finite_slots(stream))
            for index, params in enumerate(self.layer_params):
                kind, number = self.place_of_layer[index]
                stream, encoded = programs.layers[kind](params, stream, number, self.arena.units, inputs, branches)
                words.append(encoded)
                if self.check_finite:
                    checks.append(programs.finite_slots(stream))
        sampling = tuple(chunk for chunk in output.chunks if chunk.samples)
        return BegunStep(spec, output, sampling, rows, inputs, stream, words, checks)

    def finish(self, step: BegunStep, *, masked: bool = False, scored: bool = False) -> LaunchedStep:
        """Calls the rest of a step: sampling, scores, and writing what it computed. To be called when all tokens that
        it computes are known, which is while its layers are computed.

        Args:
            masked: with masks of tokens even if no request needs them.
            scored: also a tile that scores nothing.
        """
        spec, output, rows = step.spec, step.output, step.spec.shape.rows
        always = masked or self.reproducible  # with masks the head is another program
        host_sampling = build_sampling(step.rows, rows, self.max_seq_len, step.drafts_ahead)
        masks = build_masks(step.rows, rows, self.model.config.vocab_size, self.eos_ids, always)
        allowed, stuck = (None, {}) if masks is None else (masks.allowed, masks.stuck)
        programs = self._programs_of(spec)
        with self._noting_compilations(spec, programs):
            sampling, allowed = programs.put(self.arena.group, (host_sampling._replace(history=None), allowed))
            sampling = sampling._replace(history=_history_on(self.arena.group, host_sampling))
            arguments = (self.params, step.stream, step.inputs, sampling, allowed)
            outputs = self.logits_processing.call_head(programs, step.rows, rows, *arguments)
            plan = ScoringPlan([], [empty_tile(spec)]) if scored else plan_scores(spec, output)
            tiles = [programs.score(self.params, step.stream, tile) for tile in plan.tiles]
            kept = [programs.hidden(step.stream, tile.slots) for tile in plan.tiles] if plan.keeps_hidden else []
            pooling = plan_pooling(spec, output)
            sums = None if pooling is None else programs.pool(self.params, step.stream, pooling.owners)
            self.arena.units = programs.commit(self.arena.units, step.words, step.inputs)
        return LaunchedStep(step, outputs, plan, tiles, kept, stuck, pooling, sums)

    def collect(self, launched: LaunchedStep) -> StepResult:
        """What a step gave; waits until it is computed. Steps are collected in the order of their launches."""
        step, plan = launched.step, launched.plan
        (sampled, finite), tiles, kept, checked, sums = jax.device_get(
            (launched.outputs, launched.tiles, launched.kept, step.checks, launched.sums)
        )
        tokens, finite_logits = accepted(step.sampling, sampled_tokens(step.rows, sampled), finite, sampled.finite)
        scores = plan.collect(tiles)
        for request, own in scores.items():
            if request.branches:
                continue  # what is wrong with one is no reason to lose the others
            finite_logits[request] = all(math.isfinite(s.logprob) for s in own) and finite_logits.get(request, True)
        nonfinite = find_nonfinite(step.spec, step.output, finite_logits, finite, checked)
        stuck = {request: reason for request, reason in launched.stuck.items() if request not in nonfinite}
        if ended := nonfinite.keys() | stuck.keys():
            tokens = [token for token in tokens if token.request not in ended]
        pooled = {} if launched.pooling is None else launched.pooling.collect(sums)
        return StepResult(tokens, nonfinite, stuck, scores, plan.collect_hidden(kept), pooled)

    def _programs_of(self, spec: StepSpec) -> StepPrograms:
        return step_programs(spec) if self._ahead is None else step_programs(spec).stand_ins(self._ahead)

    @contextmanager
    def _noting_compilations(self, spec: StepSpec, programs: StepPrograms) -> Iterator[None]:
        before, start = len(programs.compiled), time.perf_counter()
        yield
        stages = programs.compiled[before:]
        if not stages:
            return
        self.num_compilations += len(stages)
        what = f"{'+'.join(dict.fromkeys(stages))} of {spec.shape} for {'+'.join(spec.format_names)}"
        seconds = time.perf_counter() - start
        if self._is_warm:
            why = why_compiled(spec, stages, self._compiled_ahead)
            log.warning("compiled %s in %.1f s after the warm-up, because of %s", what, seconds, why)
        else:
            log.info("compiled %s in %.1f s", what, seconds)


def _history_on(group: DeviceGroup, sampling: SamplingInputs) -> jax.Array:
    """`SamplingInputs.history`, which goes over only where a row has penalties, since nothing else looks at it."""
    if sampling.any_penalty:
        history: jax.Array = group.put(sampling.history)
        return history
    return _no_history(group, sampling.history.shape)


@functools.cache
def _no_history(group: DeviceGroup, shape: tuple[int, int]) -> jax.Array:
    history: jax.Array = group.put(np.full(shape, -1, np.int32))
    return history
