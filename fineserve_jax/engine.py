"""The engine: requests in, tokens out. A step is schedule -> execute -> commit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fineserve_jax.assembly import assemble
from fineserve_jax.config import EngineConfig
from fineserve_jax.errors import RequestError
from fineserve_jax.kv.usage import FormatUsage
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.outputs import GrowingText
from fineserve_jax.request import FinishReason, Request, RequestStatus, RequestTimes, StepPlan
from fineserve_jax.runner.runner import SampledToken, StepResult
from fineserve_jax.runner.sampler import MAX_STOP_IDS
from fineserve_jax.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How the engine stands and what it did so far.

    Attributes:
        kv: per KV format, bytes needed, reserved and free.
        kv_bytes: the arena's size.
        num_waiting, num_running: requests without and with memory.
        num_prompt_tokens, num_output_tokens: computed and sampled tokens since the start.
        output_tokens_per_s: sampled tokens over the time spent in steps, compilation included.
        num_steps, num_preemptions, num_compilations: since the start.
        prediction_error: typical relative error of predicted step times; None before there is one.
    """

    kv: dict[str, FormatUsage]
    kv_bytes: int
    num_waiting: int
    num_running: int
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    num_steps: int
    num_preemptions: int
    num_compilations: int
    prediction_error: float | None


class Engine:
    """Serves requests of one model, each with its KV cache in its own precision.

    Not thread-safe: one thread adds requests and calls `step`.

    Args:
        model: as `loaders.load_model` gives it.
        config: settings.
        clock: seconds, monotonic.

    Raises:
        ConfigError: settings that this model or device rules out.
    """

    def __init__(
        self,
        model: LoadedModel,
        config: EngineConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config or EngineConfig()
        self.model, self.tokenizer = model, model.tokenizer
        self.kv, self.scheduler, self.runner, self.max_seq_len = assemble(model, self.config)
        self.clock = clock
        self.formats = self.config.served_formats  # as of now: formats registered later have no pages here
        self.texts: dict[Request, GrowingText] = {}
        self._num_requests = self._num_steps = self._num_prompt_tokens = self._num_output_tokens = 0
        self._busy_s = 0.0

    # -- requests ------------------------------------------------------------------------------------------------

    def check(self, token_ids: Sequence[int], sampling: SamplingParams, kv_precision: str | None = None) -> None:
        """Raises `RequestError` for a request that can never be served, saying what is wrong and what to do."""
        kv_precision = self._kv_precision(kv_precision)
        if not token_ids:
            raise RequestError("the prompt is empty; give at least one token")
        vocab_size = self.model.config.vocab_size
        named = {
            "prompt": token_ids,
            "logit_bias": sampling.logit_bias,
            "stop_token_ids": sampling.stop_token_ids,
        }
        for name, ids in named.items():
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                wrong = next(token for token in ids if not 0 <= token < vocab_size)
                raise RequestError(f"{name} has token {wrong}; {self.model.name} has tokens 0 to {vocab_size - 1}")
        if len(token_ids) >= self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(token_ids)} tokens; with max_seq_len={self.max_seq_len} it may have "
                f"{self.max_seq_len - 1}, one being left to generate; shorten it or raise max_seq_len"
            )
        if sampling.min_tokens > self.max_seq_len - len(token_ids):
            raise RequestError(
                f"min_tokens={sampling.min_tokens} after a prompt of {len(token_ids)} tokens is more than "
                f"max_seq_len={self.max_seq_len}; lower it or raise max_seq_len"
            )
        num_stop_ids = len(self._stop_ids(sampling))
        if sampling.min_tokens and num_stop_ids > MAX_STOP_IDS:
            raise RequestError(
                f"min_tokens={sampling.min_tokens} has to hold back {num_stop_ids} tokens, end-of-sequence tokens "
                f"included; it can hold back {MAX_STOP_IDS}; use fewer stop_token_ids or min_tokens=0"
            )
        total = self._max_total_tokens(token_ids, sampling)
        if not self.kv.fits_alone(self.model.name, kv_precision, total):
            longest = self.kv.max_tokens_alone(self.model.name, kv_precision)
            raise RequestError(
                f"a request of up to {total} tokens in {kv_precision} does not fit the KV memory, which holds "
                f"{longest} such tokens; lower max_tokens, choose a narrower kv_precision or raise kv_memory"
            )

    def add_request(
        self,
        token_ids: Sequence[int],
        sampling: SamplingParams | None = None,
        *,
        kv_precision: str | None = None,
        request_id: str | None = None,
        sample_index: int = 0,
        ttft_slo_s: float | None = None,
        tpot_slo_s: float | None = None,
        drop_when_late: bool = False,
        tenant: str = "",
    ) -> Request:
        """Lets a request wait for its turn.

        Args:
            token_ids: the prompt.
            sampling: how to sample; greedy if None. Its `n` is the caller's business: one request is one sample.
            kv_precision: KV format; None for the engine's.
            request_id: unique; None assigns one.
            sample_index: which of several samples of one prompt this is; moves its seed.
            ttft_slo_s, tpot_slo_s, drop_when_late, tenant: see `Request`.

        Raises:
            RequestError: see `check`.
        """
        sampling = sampling or SamplingParams()
        self.check(token_ids, sampling, kv_precision)
        sequence = self._num_requests
        request = Request(
            request_id=f"request-{sequence}" if request_id is None else request_id,
            model=self.model.name,
            kv_precision=self._kv_precision(kv_precision),
            sampling=sampling,
            token_ids=list(token_ids),
            num_prompt_tokens=len(token_ids),
            max_total_tokens=self._max_total_tokens(token_ids, sampling),
            sequence=sequence,
            times=RequestTimes(self.clock()),
            seed=self._seed(sampling, sequence, sample_index),
            stop_ids=self._stop_ids(sampling),
            ttft_slo_s=ttft_slo_s,
            tpot_slo_s=tpot_slo_s,
            drop_when_late=drop_when_late,
            tenant=tenant,
        )
        self.scheduler.add(request)
        self._num_requests += 1
        self.runner.use_formats([request.kv_precision])
        self.texts[request] = GrowingText(self.tokenizer, sampling.stop)
        return request

    def abort(self, request: Request) -> None:
        """Ends a request at once, whatever it is doing; its tokens so far stay in it."""
        if request.status is not RequestStatus.FINISHED:
            self._finish(request, FinishReason.ABORT)

    def release(self, request: Request) -> None:
        """Forgets a finished request's text. Callers do this when they have taken what they need."""
        self.texts.pop(request, None)

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished

    # -- steps ---------------------------------------------------------------------------------------------------

    def step(self) -> list[Request]:
        """Computes one step; returns the requests that got a token, some of which it may have finished."""
        plan = self.scheduler.schedule(self.clock())
        for request in self.scheduler.take_dropped():
            self.texts[request].finish()
        if plan is None:
            return []
        start = time.perf_counter()
        result = self.runner.execute(plan)
        advanced = self._commit(plan, result)
        self._busy_s += time.perf_counter() - start
        self._num_steps += 1
        return advanced

    def _commit(self, plan: StepPlan, result: StepResult) -> list[Request]:
        prompt_tokens = sum(
            max(0, min(work.start + work.count, work.request.num_prompt_tokens) - work.start) for work in plan.works
        )
        sampled = {token.request: token for token in result.tokens}
        tokens = [sampled[work.request].token if work.request in sampled else -1 for work in plan.works]
        advanced = self.scheduler.commit(plan, tokens, self.clock())
        if not result.compiled:
            self.scheduler.observe(plan, result.seconds)
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
        self.scheduler.finish(request, reason, self.clock())
        if not self.scheduler.has_unfinished:
            self.kv.check_integrity()

    # -- what follows from a request's parameters ------------------------------------------------------------------

    def _kv_precision(self, kv_precision: str | None) -> str:
        name = kv_precision or self.config.kv_precision
        if name not in self.formats:
            raise RequestError(f"kv_precision={name!r} is not served; choose one of {', '.join(self.formats)}")
        return name

    def _stop_ids(self, sampling: SamplingParams) -> frozenset[int]:
        ends = () if sampling.ignore_eos else self.tokenizer.eos_token_ids
        return frozenset(sampling.stop_token_ids).union(ends)

    def _max_total_tokens(self, token_ids: Sequence[int], sampling: SamplingParams) -> int:
        if sampling.max_tokens is None:
            return self.max_seq_len
        return min(len(token_ids) + sampling.max_tokens, self.max_seq_len)

    def _seed(self, sampling: SamplingParams, sequence: int, sample_index: int) -> int:
        if sampling.seed is not None:
            return (sampling.seed + sample_index) % 2**32
        return int(np.random.SeedSequence((self.config.seed, sequence)).generate_state(1)[0])

    # -- accounts --------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """Where the engine stands now."""
        profile = self.scheduler.profiles[self.model.name]
        return EngineStats(
            kv=self.kv.usage().formats,
            kv_bytes=self.runner.arena.nbytes,
            num_waiting=self.scheduler.num_waiting,
            num_running=self.scheduler.num_running,
            num_prompt_tokens=self._num_prompt_tokens,
            num_output_tokens=self._num_output_tokens,
            output_tokens_per_s=self._num_output_tokens / self._busy_s if self._busy_s else 0.0,
            num_steps=self._num_steps,
            num_preemptions=self.scheduler.num_preemptions,
            num_compilations=self.runner.num_compilations,
            prediction_error=profile.error,
        )
