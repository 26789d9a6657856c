"""The engine: requests in, tokens out. A step is schedule -> execute -> commit."""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fineserve_jax.engine.build import ServedModel, build_engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_loading import ModelLoading
from fineserve_jax.engine.model_settings import ModelSettings, model_sources
from fineserve_jax.engine.new_weights import WeightSource
from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.engine.output_processor import OutputProcessor
from fineserve_jax.engine.outputs import RequestOutput, request_output
from fineserve_jax.engine.pipeline import StepPipeline
from fineserve_jax.engine.prepare import PreparedRequest, named_model, prepare_request, use_precision
from fineserve_jax.engine.recovery import Recovery
from fineserve_jax.engine.request_text import RequestText
from fineserve_jax.engine.residence import Residence
from fineserve_jax.engine.resuming import SampleSoFar, replay
from fineserve_jax.engine.stats import EngineStats, StepTotals, engine_stats
from fineserve_jax.engine.warm_up import warm_up
from fineserve_jax.errors import EngineError, FineServeError, RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.recording import Recorder
from fineserve_jax.loaders import LoadedModel, Tokenizer
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.runner import ModelRunner
from fineserve_jax.scheduler import load_profiles, save_profiles

log = logging.getLogger(__name__)


class Engine:
    """Serves requests of one model or of several, each with its KV cache in its own precision.

    Not thread-safe: one thread adds requests and calls `step`; see `EngineLoop` for several. `prepare` may be called by
    any.

    Whatever is raised in the middle of a call, an interrupt too, the engine goes on with the next one: what was cut
    short is undone, and unfinished requests are computed again from their tokens, of which none is lost or changed.

    Args:
        model: as `loaders.load_model` gives it; or several, by the names that requests use.
        config: settings.
        clock: seconds, monotonic.
        settings: of single models, where they differ from `config`; by name.
        devices: the first `tensor_parallel` of these compute its steps; None: of all that JAX finds.

    Attributes:
        loading: changes `models` between two steps.
        models: what it serves, by name. `model`, `tokenizer`, `runner` and `max_seq_len` are those of the only one.
        detokenizers: the text of each request, until `release`.
        pipeline: its steps on their way through the device.

    Raises:
        ConfigError: settings that a model or the device rules out.
    """

    def __init__(
        self,
        model: LoadedModel | Mapping[str, LoadedModel],
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        settings: Mapping[str, ModelSettings] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> None:
        self.config = config or EngineConfig()
        models = {model.name: model} if isinstance(model, LoadedModel) else model
        parts = build_engine(models, self.config, settings or {}, devices)
        self.kv, self.scheduler, self.arena, self.page_operations, self.models = parts
        if self.config.step_profile is not None:
            check_can_write("step_profile", self.config.step_profile, replaced=True)
            if Path(self.config.step_profile).exists():
                self.scheduler.start_from(load_profiles(self.config.step_profile))
        self.clock = clock
        self._outputs = OutputProcessor(self.kv, self.scheduler, clock)
        self.detokenizers = self._outputs.texts
        operations, ahead = self.page_operations, self.config.async_scheduling
        self.pipeline = StepPipeline(self.models, self.kv, self.scheduler, operations, ahead)
        self._recovery = Recovery(self.arena, self.kv, self.scheduler, self._outputs, self.pipeline)
        self._residence = Residence(self.models, self.arena, self.kv, self._recovery)
        self.loading = ModelLoading(self.models, self.config, *parts[:4], self._recovery)
        self._num_requests, self._totals = 0, StepTotals()
        record = self.config.record
        self._recorder = None if record is None else Recorder(record, self.kv, self.config.record_every)

    # -- models --------------------------------------------------------------------------------------------------

    def served(self, model: str | None = None) -> ServedModel:
        """The model of that name; None stands for the only one. Raises `RequestError`, naming those there are."""
        return named_model(self.models, model)

    @property
    def max_batch_size(self) -> int:
        return self.config.max_batch_size

    @property
    def served_formats(self) -> tuple[str, ...]:
        """KV formats that requests may name."""
        return self.config.served_formats

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

    def prepare(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
        pooled_from: int | None = None,
    ) -> PreparedRequest:
        """Checks a request and resolves its precision; `queue` then lets it wait for its turn.

        Args:
            token_ids: the prompt.
            sampling: how to sample; greedy if None.
            options: who answers, in which KV precision, how soon.
            pooled_from: index of the first token whose hidden states are pooled, see `LLM.embed`; None: none are.

        Raises:
            RequestError: a request that can never be served, saying what is wrong and what to do.
        """
        return prepare_request(self.models, self.kv, self.scheduler.quotas, token_ids, sampling, options, pooled_from)

    def queue(self, prepared: PreparedRequest, so_far: Sequence[SampleSoFar] = ()) -> list[Request]:
        """Lets all `n` samples of a prompt wait for their turn, or none if that is interrupted; all but the first may
        start from its pages.

        Args:
            so_far: what samples had when they were interrupted, one each or none: they go on as a preempted request
                does, and those that had come to their end are finished at once.
        """
        samples: list[Request] = []
        had = dict(enumerate(so_far))
        try:
            for index in range(prepared.sampling.n):
                first = samples[0] if samples else None
                samples.append(self._queue_sample(prepared, None, index, first, had.get(index)))
        except BaseException:
            for request in samples:
                self.abort(request)
                self.release(request)
            raise
        return samples

    def add_request(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        options: RequestOptions | None = None,
        *,
        request_id: str | None = None,
        sample_index: int = 0,
        fork_of: Request | None = None,
    ) -> Request:
        """Prepares one sample of a prompt, whatever its `n`, and lets it wait for its turn.

        Args:
            token_ids, sampling, options: see `prepare`.
            request_id: unique; None assigns one.
            sample_index: which of several samples of one prompt this is; moves its seed.
            fork_of: another sample of the same prompt, to start from its pages if they are still there.

        Raises:
            RequestError: see `prepare`; a `request_id` that is in use, or a `fork_of` of another prompt.
        """
        return self._queue_sample(self.prepare(token_ids, sampling, options), request_id, sample_index, fork_of)

    def _queue_sample(
        self,
        prepared: PreparedRequest,
        request_id: str | None = None,
        sample_index: int = 0,
        fork_of: Request | None = None,
        so_far: SampleSoFar | None = None,
    ) -> Request:
        self.recover()
        self._residence.check_awake()
        self.loading.check_served(prepared.served)
        sequence = self._num_requests
        own_id = self._unused_id() if request_id is None else request_id
        if own_id in self.scheduler:
            raise RequestError(f"request_id={own_id!r} is in use; give each request its own")
        if so_far is not None and so_far.token_ids:
            fork_of = None  # its tokens are no longer those of the other sample
        request = prepared.request(own_id, sequence, self.clock(), self.config.seed, sample_index, fork_of)
        text = RequestText(request, prepared.served.tokenizer)
        if so_far is not None:
            replay(request, text, so_far)
        with self._recovery.changing():
            use_precision(self.models[prepared.served.name], self.kv, prepared.precision)
            if request.status is not RequestStatus.FINISHED:
                self.scheduler.add(request)
            self._num_requests += 1
            self.detokenizers[request] = text
        return request

    def _unused_id(self) -> str:
        """An id for the next request: its number, unless a caller has given that to one of their own."""
        numbers = itertools.count(self._num_requests)
        return next(name for number in numbers if (name := f"request-{number}") not in self.scheduler)

    def output(self, samples: Sequence[Request], prompt: str | None = None) -> RequestOutput:
        """What a prompt gave whose samples have all finished and are not released. `prompt`: its text, if any."""
        return request_output(samples, [self.detokenizers[request].text for request in samples], prompt)

    def abort(self, request: Request) -> None:
        """Ends a request at once, whatever it is doing; its tokens so far stay in it."""
        self._end(request, FinishReason.ABORT)

    def withdraw(self, request: Request) -> None:
        """Takes back a request that waits and has never had memory, as if it had not come; nobody is told."""
        self.recover()
        with self._recovery.changing():
            self.scheduler.finish(request, FinishReason.ABORT, self.clock())
            del self.detokenizers[request]
            if not self.scheduler.has_unfinished:
                self._on_idle()

    def fail(self, request: Request, error: FineServeError) -> None:
        """Ends a request at once because of an error, of which it tells; its tokens so far stay in it."""
        self._end(request, FinishReason.ERROR, error)

    def _end(self, request: Request, reason: FinishReason, error: FineServeError | None = None) -> None:
        self.recover()
        if request.status is RequestStatus.FINISHED:
            return
        with self._recovery.changing():
            request.error = error
            self._outputs.finish(request, reason)
            if not self.scheduler.has_unfinished:
                self._on_idle()

    def release(self, request: Request) -> None:
        """Forgets a finished request's text. Callers do this when they have taken what they need."""
        self.detokenizers.pop(request, None)

    # -- models come and go --------------------------------------------------------------------------------------

    def load_model(self, name: str, source: str | Path | Mapping[str, Any]) -> None:
        """Serves a further model, out of the same KV memory.

        Args:
            name: what requests call it.
            source: an alias or a path, or a table of the fields of `ModelSource`.

        Raises:
            ConfigError: a name in use, settings that contradict the engine's, weights for which there is no memory,
                pages that do not fit the arena's units and slabs, or a slab policy that divides it for good.
            ModelLoadError: a model that cannot be found, read or used.
            EngineError: the engine is asleep.
        """
        (settings,) = model_sources({name: source}).values()
        self.add_model(name, self.loading.read(name, settings), settings)

    def add_model(self, name: str, model: LoadedModel, settings: ModelSettings | None = None) -> None:
        """`load_model` of one that is loaded, perhaps by another thread (`loading.read`)."""
        self.recover()
        self._residence.check_awake()
        self.loading.add(name, model, settings or ModelSettings())

    def unload_model(self, name: str) -> None:
        """Serves a model no longer: its weights are dropped, its cached pages evicted, its slabs free for others.

        Raises:
            ModelNotServedError: no such model.
            EngineError: requests of it are unfinished, or the engine is asleep.
        """
        self.served(name)
        self._settle(f"unload_model({name!r})", name)
        self._residence.check_awake()
        self.loading.remove(name)

    # -- weights and memory --------------------------------------------------------------------------------------

    def update_params(self, source: WeightSource, model: str | None = None) -> None:
        """Gives a model new weights; see `Residence.update_params`.

        Args:
            source: where they come from.
            model: whose; None for the only one there is.

        Raises:
            EngineError: there are unfinished requests.
            ModelLoadError, ConfigError: see `new_params`.
        """
        self._settle("update_params")
        self._residence.update_params(self.served(model), source)

    def sleep(self, *, drop_weights: bool = False) -> None:
        """Gives memory back until `wake_up`; see `Residence.sleep`. Raises `EngineError` for unfinished requests."""
        self._settle("sleep")
        self._residence.sleep(drop_weights)

    def wake_up(self) -> None:
        """Takes the memory again; see `Residence.wake_up`. Raises `EngineError` if there are no weights."""
        self._residence.wake_up()

    @property
    def is_asleep(self) -> bool:
        return self._residence.is_asleep

    def _settle(self, what: str, model: str | None = None) -> None:
        self.recover()
        unfinished = [request.model for request in self.detokenizers if request.finish_reason is None]
        if count := sum(model in (None, name) for name in unfinished):
            raise EngineError(f"{what} while {count} requests are unfinished; finish or abort them before")

    @property
    def has_unfinished(self) -> bool:
        self.recover()
        return self.scheduler.has_unfinished

    def warm_up(
        self,
        kv_precisions: Sequence[str] = (),
        min_kv_precision: str | None = None,
        *,
        structured_outputs: bool = False,
        prompt_logprobs: bool = False,
    ) -> int:
        """Compiles ahead all programs that requests in these KV formats, and in each model's own, can need.

        Args:
            kv_precisions: KV formats, or "auto".
            min_kv_precision: what requests in them will name as such; None: nothing.
            structured_outputs, prompt_logprobs: also what requests with such need.

        Returns:
            how many programs that took. Serving those requests compiles nothing from then on.
        """
        self.recover()
        self._residence.check_awake()
        before = self._num_compilations
        converts = self.config.prefix_cache == "convert"
        with self._recovery.changing():
            warm_up(
                self.models.values(),
                self.kv,
                self.page_operations,
                kv_precisions,
                min_kv_precision,
                converts=converts,
                structured_outputs=structured_outputs,
                prompt_logprobs=prompt_logprobs,
            )
        return self._num_compilations - before

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Computes one step; returns the requests that got a token, some of which it may have finished, and those that
        ended because they wanted none, because they were late, because numbers were not finite, or because nothing may
        follow what they said."""
        self.pipeline.computing = ()
        self.recover()
        with self._recovery.changing():
            return self._step()

    def _step(self) -> list[Request]:
        start, host_start = time.perf_counter(), time.thread_time()
        compiled_before, was_ahead = self._num_compilations, self.pipeline.is_ahead
        step = self.pipeline.next(self.clock())
        begun = None if step is None else self.pipeline.begin_behind(step, self.clock())
        dropped = self.scheduler.take_dropped()
        for request in dropped:
            self.detokenizers[request].end()
        if step is None:
            if dropped:
                self._on_idle()
            return dropped
        result = self.pipeline.collect(step)
        advanced = self._outputs.process(step.output, result)
        self.pipeline.finish(begun)
        seconds, host_s = time.perf_counter() - start, time.thread_time() - host_start
        compiled = self._num_compilations > compiled_before
        times = {"seconds": seconds, "host_s": host_s}
        self._totals.add_step(step.output, result, **times, compiled=compiled, ahead=was_ahead)
        if not compiled and not result.scores:  # whose products no prediction counts
            self.scheduler.observe(step.output, seconds)
        if not self.scheduler.has_unfinished:
            self._on_idle()
        if self.config.check_every and self._totals.steps % self.config.check_every == 0:
            check_integrity(self.kv, thorough=False)
        if self._recorder is not None:
            self._record(self._recorder)
        return advanced + dropped

    @property
    def computing(self) -> tuple[Request, ...]:
        """The requests of the last step that was computed, or begun."""
        return self.pipeline.computing

    def _record(self, recorder: Recorder) -> None:
        counts = {"preemptions": self.scheduler.num_preemptions, "reclaimed_rows": self.scheduler.num_reclaimed}
        waiting, running = self.scheduler.num_waiting, self.scheduler.num_running
        recorder.note(self._totals.steps, self.clock(), running, waiting, counts)

    def _on_idle(self) -> None:
        """What is done when nobody is left to serve: the books are audited and step times saved."""
        self.pipeline.drop()
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

    # -- what was cut short ----------------------------------------------------------------------------------------

    def recover(self) -> None:
        """If the last call was cut short, makes the books anew; all calls that change something do this first."""
        self._recovery.recover()

    def serve_only(self, requests: Iterable[Request] | None) -> None:
        """Serves these requests, and those that come from now on, with all others kept waiting; None: all again.

        Those that are served from now on are computed again from their tokens.
        """
        self._recovery.serve_only(requests)

    # -- accounts --------------------------------------------------------------------------------------------------

    @property
    def _num_compilations(self) -> int:
        of_models = sum(served.runner.num_compilations for served in self.models.values())
        return self.page_operations.num_compilations + self.loading.num_compilations + of_models

    def stats(self) -> EngineStats:
        """Where the engine stands now."""
        self.recover()
        return engine_stats(self.models, self.kv, self.arena, self.scheduler, self._totals, self._num_compilations)
