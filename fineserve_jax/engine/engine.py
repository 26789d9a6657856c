"""The engine: requests in, tokens out. A step is schedule -> execute -> commit."""

import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fineserve_jax.engine.build import ServedModel, build_engine
from fineserve_jax.engine.detokenizer import IncrementalDetokenizer
from fineserve_jax.engine.engine_config import AUTO, EngineConfig
from fineserve_jax.engine.model_settings import ModelSettings
from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.engine.precision import Precision, resolve_precision
from fineserve_jax.engine.request_checks import check_memory, check_targets, check_tokens
from fineserve_jax.engine.stats import EngineStats, ModelStats
from fineserve_jax.errors import RequestError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.recording import Recorder
from fineserve_jax.kv.stats import ClassStats
from fineserve_jax.kv.usage import count_events, measure_classes, measure_usage
from fineserve_jax.loaders import LoadedModel, Tokenizer
from fineserve_jax.request import FinishReason, Request, RequestStatus, RequestTimes, SchedulerOutput
from fineserve_jax.runner.runner import ModelRunner, SampledToken, StepResult
from fineserve_jax.sampling_params import SamplingParams
from fineserve_jax.scheduler import load_profiles, save_profiles

log = logging.getLogger(__name__)


class Engine:
    """Serves requests of one model or of several, each with its KV cache in its own precision.

    Not thread-safe: one thread adds requests and calls `step`.

    Args:
        model: as `loaders.load_model` gives it; or several, by the names that requests use.
        config: settings.
        clock: seconds, monotonic.
        settings: of single models, where they differ from `config`; by name.

    Attributes:
        models: what it serves, by name. `model`, `tokenizer`, `runner` and `max_seq_len` are those of the only one.

    Raises:
        ConfigError: settings that a model or the device rules out.
    """

    def __init__(
        self,
        model: LoadedModel | Mapping[str, LoadedModel],
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        settings: Mapping[str, ModelSettings] | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        models = {model.name: model} if isinstance(model, LoadedModel) else model
        parts = build_engine(models, self.config, settings or {})
        self.kv, self.scheduler, self.arena, self.page_operations, self.models = parts
        if self.config.step_profile is not None:
            check_can_write("step_profile", self.config.step_profile, replaced=True)
            if Path(self.config.step_profile).exists():
                self.scheduler.start_from(load_profiles(self.config.step_profile))
        self.clock = clock
        self.formats = self.config.served_formats  # as of now: formats registered later have no pages here
        self.texts: dict[Request, IncrementalDetokenizer] = {}
        self._num_requests = self._num_steps = self._num_prompt_tokens = self._num_output_tokens = 0
        self._busy_s = 0.0
        record = self.config.record
        self._recorder = None if record is None else Recorder(record, self.kv, self.config.record_every)

    # -- models --------------------------------------------------------------------------------------------------

    def served(self, model: str | None = None) -> ServedModel:
        """The model of that name; None stands for the only one. Raises `RequestError`, naming those there are."""
        known = ", ".join(self.models)
        if model is None:
            if len(self.models) > 1:
                raise RequestError(f"no model is named, and there are several; give model as one of {known}")
            return next(iter(self.models.values()))
        if model not in self.models:
            raise RequestError(f"model={model!r} is not served; choose one of {known}")
        return self.models[model]

    @property
    def model(self) -> LoadedModel:
        return self.served().model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.served().tokenizer

    @property
    def runner(self) -> ModelRunner:
        return self.served().runner

    @property
    def max_seq_len(self) -> int:
        return self.served().max_seq_len

    # -- requests ------------------------------------------------------------------------------------------------

    def check(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        kv_precision: str | None = None,
        model: str | None = None,
        min_kv_precision: str | None = None,
        tenant: str = "",
    ) -> None:
        """Raises `RequestError` for a request that can never be served, saying what is wrong and what to do."""
        served = self.served(model)
        total = self._max_total_tokens(served, token_ids, sampling)
        precision = self._precision(served, kv_precision, min_kv_precision, total)
        check_tokens(served, token_ids, sampling, self._stop_ids(served, sampling))
        check_memory(self.kv, served.name, precision.start, total)
        self.scheduler.quotas.check(served.name, precision.start, tenant, total)

    def add_request(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        kv_precision: str | None = None,
        min_kv_precision: str | None = None,
        model: str | None = None,
        request_id: str | None = None,
        sample_index: int = 0,
        fork_of: Request | None = None,
        ttft_slo_s: float | None = None,
        tpot_slo_s: float | None = None,
        drop_when_late: bool = False,
        tenant: str = "",
    ) -> Request:
        """Lets a request wait for its turn.

        Args:
            token_ids: the prompt.
            sampling: how to sample; greedy if None. Its `n` is the caller's business: one request is one sample.
            kv_precision: KV format, or "auto"; None for the model's own, which is the engine's unless it has another.
            min_kv_precision: KV format its older tokens may be narrowed to when memory is short; None for the
                engine's, if that has one. With "auto" the narrowest unless another is named.
            model: who answers; None for the only one there is.
            request_id: unique; None assigns one.
            sample_index: which of several samples of one prompt this is; moves its seed.
            fork_of: another sample of the same prompt, to start from its pages if they are still there.
            ttft_slo_s, tpot_slo_s, drop_when_late, tenant: see `Request`.

        Raises:
            RequestError: see `check`; targets that are not positive, or to be dropped when late without one.
        """
        sampling = sampling or SamplingParams()
        self.check(token_ids, sampling, kv_precision, model, min_kv_precision, tenant)
        check_targets(ttft_slo_s, tpot_slo_s, drop_when_late)
        served, sequence = self.served(model), self._num_requests
        total = self._max_total_tokens(served, token_ids, sampling)
        precision = self._precision(served, kv_precision, min_kv_precision, total)
        if fork_of is not None and (fork_of.model, fork_of.prompt_token_ids) != (served.name, list(token_ids)):
            raise RequestError(
                f"fork_of={fork_of.request_id!r} is of another prompt or model; fork a sample of the same prompt"
            )
        request = Request(
            request_id=f"request-{sequence}" if request_id is None else request_id,
            model=served.name,
            kv_precision=precision.start,
            min_kv_precision=precision.floor,
            fork_of=fork_of,
            sampling=sampling,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            max_total_tokens=total,
            sequence=sequence,
            times=RequestTimes(self.clock()),
            seed=self._seed(sampling, sequence, sample_index),
            stop_ids=self._stop_ids(served, sampling),
            ttft_slo_s=ttft_slo_s,
            tpot_slo_s=tpot_slo_s,
            drop_when_late=drop_when_late,
            tenant=tenant,
        )
        self.scheduler.add(request)
        self._num_requests += 1
        self._use(served, precision)
        self.texts[request] = IncrementalDetokenizer(served.tokenizer, sampling.stop)
        return request

    def add_samples(self, token_ids: Sequence[int], sampling: SamplingParams, **how: Any) -> list[Request]:
        """Lets the `sampling.n` samples of a prompt wait for their turn; all but the first may start from its pages.

        Args and errors as `add_request`.
        """
        samples = [self.add_request(token_ids, sampling, **how)]
        first_id = how.pop("request_id", None)
        for index in range(1, sampling.n):
            own_id = None if first_id is None else f"{first_id}/{index}"
            further: dict[str, Any] = {"request_id": own_id, "sample_index": index, "fork_of": samples[0]}
            samples.append(self.add_request(token_ids, sampling, **further, **how))
        return samples

    def abort(self, request: Request) -> None:
        """Ends a request at once, whatever it is doing; its tokens so far stay in it."""
        if request.status is not RequestStatus.FINISHED:
            self._finish(request, FinishReason.ABORT)
            if not self.scheduler.has_unfinished:
                self._on_idle()

    def release(self, request: Request) -> None:
        """Forgets a finished request's text. Callers do this when they have taken what they need."""
        self.texts.pop(request, None)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    def warm_up(self, kv_precisions: Sequence[str] = (), min_kv_precision: str | None = None) -> int:
        """Compiles ahead all programs that requests in these KV formats, and in each model's own, can need.

        Args:
            kv_precisions: KV formats, or "auto".
            min_kv_precision: what requests in them will name as such; None: nothing.

        Returns:
            how many programs that took. Serving those formats compiles nothing from then on.
        """
        before = self._num_compilations
        pairs: list[tuple[PageClass, PageClass]] = []
        for served in self.models.values():
            precisions = [self._precision(served, None, None)]
            precisions += [self._precision(served, name, min_kv_precision) for name in kv_precisions]
            for precision in precisions:
                self._use(served, precision)
                steps = self._ladder(served, precision)
                pairs += itertools.pairwise(steps)
                pairs += [(step, step) for step in (*steps, *(step.residual for step in steps if step.residual))]
            served.runner.warm_up()
        if self.config.prefix_cache == "convert":
            used = {page_class for pair in pairs for page_class in pair}
            pairs += [(a, b) for a in used for b in used if a.model == b.model and a.page_bytes > b.page_bytes]
        self.page_operations.warm_up(pairs, transfers=self.kv.host_bytes > 0)
        return self._num_compilations - before

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Computes one step; returns the requests that got a token, some of which it may have finished, and those that
        ended because they were late."""
        start, compiled_before = time.perf_counter(), self._num_compilations
        plan = self.scheduler.schedule(self.clock())
        dropped = self.scheduler.take_dropped()
        for request in dropped:
            self.texts[request].finish()
        if plan is None:
            if dropped:
                self._on_idle()
            return dropped
        advanced = self._commit(plan, self.execute(plan))
        seconds = time.perf_counter() - start
        self._busy_s += seconds
        self._num_steps += 1
        if self._num_compilations == compiled_before:
            self.scheduler.observe(plan, seconds)
        if not self.scheduler.has_unfinished:
            self._on_idle()
        if self.config.check_every and self._num_steps % self.config.check_every == 0:
            check_integrity(self.kv, thorough=False)
        if self._recorder is not None:
            self._record(self._recorder)
        return advanced + dropped

    def _record(self, recorder: Recorder) -> None:
        counts = {"preemptions": self.scheduler.num_preemptions, "reclaimed_rows": self.scheduler.num_reclaimed}
        waiting, running = self.scheduler.num_waiting, self.scheduler.num_running
        recorder.note(self._num_steps, self.clock(), running, waiting, counts)

    def execute(self, plan: SchedulerOutput, scores: bool = False) -> StepResult:
        """Does what the KV manager has queued for the device, and computes a plan; see `ModelRunner.execute`."""
        self.page_operations.apply(self.kv.take_operations())
        self.scheduler.note_transfer_rate(self.page_operations.bytes_per_s)
        return self.models[plan.chunks[0].request.model].runner.execute(plan, scores)

    def _commit(self, plan: SchedulerOutput, result: StepResult) -> list[Request]:
        prompt_tokens = sum(
            max(0, min(chunk.start + chunk.count, chunk.request.num_prompt_tokens) - chunk.start)
            for chunk in plan.chunks
        )
        sampled = {token.request: token for token in result.tokens}
        tokens = [sampled[chunk.request].token if chunk.request in sampled else -1 for chunk in plan.chunks]
        advanced = self.scheduler.commit(plan, tokens, self.clock())
        for request in advanced:
            self._take(request, sampled[request])
        self._num_prompt_tokens += prompt_tokens
        self._num_output_tokens += len(advanced)
        return advanced

    def _take(self, request: Request, sampled: SampledToken) -> None:
        """Adds a sampled token to the request's text, and ends the request if that is its end."""
        if sampled.logprobs is not None:
            request.logprobs.append(sampled.logprobs)
        if sampled.token in request.stop_ids or self.texts[request].push(sampled.token):
            self._finish(request, FinishReason.STOP)
        elif request.num_tokens >= request.max_total_tokens:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        self.texts[request].finish()
        request.kv_tokens = self.kv.tokens_by_format(request)
        self.scheduler.finish(request, reason, self.clock())

    def _on_idle(self) -> None:
        """What is done when nobody is left to serve: the books are audited and step times saved."""
        check_integrity(self.kv)
        self.scheduler.quotas.check_integrity()
        self._save_profiles()

    def _save_profiles(self) -> None:
        """Keeps what was learnt of step times. That it could not be written is no reason to lose answers."""
        if self.config.step_profile is None:
            return
        try:
            save_profiles(self.config.step_profile, self.scheduler.profiles)
        except OSError as error:
            log.warning("step_profile=%s could not be written: %s", self.config.step_profile, error)

    # -- what follows from a request's parameters ------------------------------------------------------------------

    def _precision(
        self, served: ServedModel, kv_precision: str | None, min_kv_precision: str | None, num_tokens: int = 1
    ) -> Precision:
        name, floor = kv_precision or served.config.kv_precision, min_kv_precision or served.config.min_kv_precision
        if min_kv_precision is None and floor is not None and name not in (AUTO, served.config.kv_precision):
            floor = None  # the engine's floor belongs to the engine's precision
        precision = resolve_precision(self.kv, served.name, self.formats, name, floor, num_tokens)
        if precision.floor is not None and self.config.slab_policy != "elastic":
            raise RequestError(
                f"a request in {name} that may be narrowed to {precision.floor} cannot be served with "
                f"slab_policy={self.config.slab_policy!r}, where that frees nothing; give a fixed kv_precision"
            )
        return precision

    def _use(self, served: ServedModel, precision: Precision) -> None:
        """Make the model's programs serve requests of this precision."""
        served.runner.use_formats(step.kv_format for step in self._ladder(served, precision))
        if precision.floor is not None:
            served.runner.use_narrowing()

    def _ladder(self, served: ServedModel, precision: Precision) -> list[PageClass]:
        return self.kv.ladder(served.name, precision.start, precision.floor)

    def _stop_ids(self, served: ServedModel, sampling: SamplingParams) -> frozenset[int]:
        ends = () if sampling.ignore_eos else served.tokenizer.eos_token_ids
        return frozenset(sampling.stop_token_ids).union(ends)

    def _max_total_tokens(self, served: ServedModel, token_ids: Sequence[int], sampling: SamplingParams) -> int:
        if sampling.max_tokens is None:
            return served.max_seq_len
        return min(len(token_ids) + sampling.max_tokens, served.max_seq_len)

    def _seed(self, sampling: SamplingParams, sequence: int, sample_index: int) -> int:
        if sampling.seed is not None:
            return (sampling.seed + sample_index) % 2**32
        return int(np.random.SeedSequence((self.config.seed, sequence)).generate_state(1)[0])

    @property
    def _num_compilations(self) -> int:
        return self.page_operations.num_compilations + sum(m.runner.num_compilations for m in self.models.values())

    # -- accounts --------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Where the engine stands now."""
        models = self._model_stats()
        errors = [model.prediction_error for model in models.values() if model.prediction_error is not None]
        return EngineStats(
            kv=measure_usage(self.kv).formats,
            kv_bytes=self.arena.nbytes,
            kv_counts=count_events(self.kv),
            num_waiting=self.scheduler.num_waiting,
            num_running=self.scheduler.num_running,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            output_tokens_per_s=self._num_output_tokens / self._busy_s if self._busy_s else 0.0,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_compilations=self._num_compilations,
            prediction_error=max(errors, default=None),
            models=models,
        )

    def _model_stats(self) -> dict[str, ModelStats]:
        kv: dict[str, dict[str, ClassStats]] = {name: {} for name in self.models}
        for page_class, stats in measure_classes(self.kv).items():
            kv[page_class.model][page_class.kv_format] = stats
        profiles = self.scheduler.profiles
        return {
            name: ModelStats(served.model.weights, kv[name], profiles[name].error)
            for name, served in self.models.items()
        }
