"""An engine without a model: it answers at once, or as slowly as is wanted, with tokens that only the request decides.

It has those parts of an engine that a batch job uses, and goes on with interrupted samples as the real one does.
"""

import dataclasses
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

from tiny_model import tiny_tokenizer

from fineserve_jax.engine.endings import ending_with
from fineserve_jax.engine.outputs import RequestOutput, request_output
from fineserve_jax.engine.request_text import RequestText
from fineserve_jax.engine.resuming import SampleSoFar, replay
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.kv.usage import FormatUsage, KVCounts
from fineserve_jax.request.request import FinishReason, Request, RequestStatus, RequestTimes
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.results import TokenLogprobs

NO_COUNTS = KVCounts(0, 0, 0, 0, 0, 0, 0)
VOCABULARY = range(5, 90)
TOKENIZER = tiny_tokenizer()


def next_token(token_ids: Sequence[int], seed: int) -> int:
    """The token that follows, which depends on all before it and on the seed."""
    return VOCABULARY[zlib.crc32(bytes(token_ids), seed) % len(VOCABULARY)]


@dataclasses.dataclass
class Prepared:
    token_ids: list[int]
    sampling: SamplingParams
    options: RequestOptions


class StubEngine:
    """Answers `batch` requests at a time, a token each in every step.

    Args:
        batch: most requests that run.
        step_s: seconds that a step takes.
        max_seq_len: most tokens of a request.
        fails: called with the requests of each step; what it raises, the step raises.
    """

    def __init__(
        self,
        batch: int = 8,
        step_s: float = 0.0,
        max_seq_len: int = 256,
        fails: Callable[[Sequence[Request]], None] | None = None,
    ) -> None:
        self.config = SimpleNamespace(max_batch_size=batch, seed=0, prefix_cache="exact", page_size=16)
        self.model = SimpleNamespace(name="stub", tokenizer=TOKENIZER, max_seq_len=max_seq_len)
        self.models = {"stub": self.model}
        self.tokenizer = self.model.tokenizer
        self.detokenizers: dict[Request, RequestText] = {}
        self.computing: tuple[Request, ...] = ()
        self.scheduler = self
        self._step_s, self._fails = step_s, fails
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self.row_limit: int | None = None
        self._served_only: set[Request] | None = None
        self._count = self._tokens = self._steps = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._waiting or self._running)

    def served(self, model: str | None = None) -> Any:
        if model not in (None, "stub"):
            raise RequestError(f"model={model!r} is not served; choose one of stub")
        return self.model

    def prepare(self, token_ids: list[int], sampling: SamplingParams, options: RequestOptions) -> Prepared:
        if len(token_ids) >= self.model.max_seq_len:
            raise RequestError(f"the prompt has {len(token_ids)} tokens; it may have {self.model.max_seq_len - 1}")
        return Prepared(token_ids, sampling, options)

    def queue(self, prepared: Prepared, so_far: Sequence[SampleSoFar] = ()) -> list[Request]:
        had = dict(enumerate(so_far))
        return [self._queue_sample(prepared, i, had.get(i)) for i in range(prepared.sampling.n)]

    def _queue_sample(self, prepared: Prepared, index: int, so_far: SampleSoFar | None) -> Request:
        self._count += 1
        prompt, sampling = prepared.token_ids, prepared.sampling
        longest = min(self.model.max_seq_len, len(prompt) + (sampling.max_tokens or self.model.max_seq_len))
        request = Request(
            request_id=f"request-{self._count}",
            model="stub",
            kv_precision=prepared.options.kv_precision or "bf16",
            sampling=sampling,
            token_ids=list(prompt),
            num_prompt_tokens=len(prompt),
            max_total_tokens=longest,
            sequence=self._count,
            times=RequestTimes(0.0),
            seed=((sampling.seed or 0) + index) % 2**32,
            stop_ids=frozenset(sampling.stop_token_ids),
        )
        text = RequestText(request, self.tokenizer)
        if so_far is not None:
            replay(request, text, so_far)
        if request.status is not RequestStatus.FINISHED:
            self._waiting.append(request)
        self.detokenizers[request] = text
        return request

    def step(self) -> list[Request]:
        self._admit()
        self.computing = tuple(self._running)
        if self._fails is not None:
            self._fails(self._running)
        if self._step_s:
            time.sleep(self._step_s)
        advanced = self._running
        for request in advanced:
            self._sample(request)
        self._running = [request for request in advanced if request.status is not RequestStatus.FINISHED]
        self._steps += 1
        return advanced

    def _admit(self) -> None:
        most = min(self.config.max_batch_size, self.row_limit or self.config.max_batch_size)
        kept: deque[Request] = deque()
        while self._waiting and len(self._running) < most:
            request = self._waiting.popleft()
            if self._served_only is not None and request not in self._served_only:
                kept.append(request)
                continue
            self._running.append(request)
            request.status = RequestStatus.RUNNING
        self._waiting.extendleft(reversed(kept))

    def serve_only(self, requests: Sequence[Request] | None) -> None:
        """All requests wait again, in the order of their arrival, and others than these stay where they are."""
        self._served_only = None if requests is None else set(requests)
        self._waiting = deque(sorted([*self._waiting, *self._running], key=lambda request: request.sequence))
        self._running = []

    def fail(self, request: Request, error: FineServeError) -> None:
        request.error = error
        self._end(request, FinishReason.ERROR)

    def _sample(self, request: Request) -> None:
        token = next_token(request.token_ids, request.seed)
        request.token_ids.append(token)
        self._tokens += 1
        if request.sampling.logprobs is not None:
            request.logprobs.append(TokenLogprobs(-token / 7, {token: -token / 7}))
        text = self.detokenizers[request]
        reason = ending_with(request, text, token)
        if reason is None:
            text.accept()
            return
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        text.end()
        request.kv_tokens = {request.kv_precision: request.num_tokens - 1}

    def recover(self) -> None:
        """A step fails before it has done anything."""

    def output(self, samples: Sequence[Request]) -> RequestOutput:
        return request_output(samples, [self.detokenizers[request].text for request in samples], None)

    def abort(self, request: Request) -> None:
        self._end(request, FinishReason.ABORT)

    def _end(self, request: Request, reason: FinishReason) -> None:
        if request.status is not RequestStatus.FINISHED:
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
            self._waiting = deque(other for other in self._waiting if other is not request)
            self._running = [other for other in self._running if other is not request]

    def release(self, request: Request) -> None:
        self.detokenizers.pop(request, None)

    def stats(self) -> EngineStats:
        usage = {"bf16": FormatUsage(len(self._running), len(self._running), 0, 0, 0, 0)}
        waiting, running, tokens = len(self._waiting), len(self._running), self._tokens
        return EngineStats(usage, 100, NO_COUNTS, waiting, running, 0, tokens, 0.0, self._steps, 0, 0, None, {})
