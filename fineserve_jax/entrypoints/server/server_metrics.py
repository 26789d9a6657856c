"""Prometheus metrics of a server, and what its page shows: how the engine stands, and how targets are met."""

import asyncio
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.metrics import RequestHistograms, engine_families, time_per_output_token_s
from fineserve_jax.request.request import FinishReason
from fineserve_jax.request.request_options import RequestOptions

FRESH_S = 0.2
"""Statistics as old as this are as good as new."""


class ServerMetrics(Collector):
    """Counts what the server answers. All methods are called on the event loop's thread."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = RequestHistograms(self._registry)
        self._answers = Counter(
            "fineserve:http_responses", "Answers, by path and status", ["path", "status"], registry=self._registry
        )
        self.targets: Counts[tuple[str, bool]] = Counts()
        self._stats: EngineStats | None = None
        self._wait_s = 0.0
        self._registry.register(self)

    def note_response(self, path: str, status: int) -> None:
        """An answer has begun."""
        self._answers.labels(path, str(status)).inc()

    def note_output(self, output: RequestOutput, options: RequestOptions) -> None:
        """A prompt was answered."""
        tokens = [len(sample.token_ids) for sample in output.outputs]
        reasons = [sample.finish_reason for sample in output.outputs]
        self._requests.observe(output.model, output.metrics, len(output.prompt_token_ids), tokens, reasons)
        if options.ttft_slo_s is not None:
            is_late = FinishReason.LATE in reasons
            self.targets["ttft", not is_late and output.metrics.ttft_s <= options.ttft_slo_s] += 1
        tpot_s = time_per_output_token_s(output.metrics, tokens)
        if options.tpot_slo_s is not None and tpot_s is not None:
            self.targets["tpot", tpot_s <= options.tpot_slo_s] += 1

    def text(self, stats: EngineStats | None, wait_s: float) -> bytes:
        """As Prometheus reads it.

        Args:
            stats: the engine's; None: there are none yet.
            wait_s: predicted for who comes now.
        """
        self._stats, self._wait_s = stats, wait_s
        return generate_latest(self._registry)

    def describe(self) -> list[Metric]:
        return []  # nothing is computed to be registered

    def collect(self) -> Iterator[Metric]:
        if self._stats is not None:
            yield from engine_families(self._stats)
        yield GaugeMetricFamily("fineserve:predicted_wait_seconds", "Until a new request has memory", self._wait_s)
        targets = CounterMetricFamily(
            "fineserve:slo_requests", "Prompts with a latency target, by whether it was met", labels=["slo", "met"]
        )
        for (slo, met), count in self.targets.items():
            targets.add_metric([slo, str(met).lower()], count)
        yield targets


class LatestStats:
    """An engine's statistics for any number of people who look, asked for by one at a time.

    Args:
        ask: for new ones, which are there after the step that the engine computes.
        patience_s: seconds after which who looks gets the last ones instead.
    """

    def __init__(self, ask: Callable[[], Awaitable[EngineStats]], patience_s: float = 1.0) -> None:
        self._ask, self._patience_s = ask, patience_s
        self._asking: asyncio.Task[EngineStats] | None = None
        self._latest: EngineStats | None = None
        self._since_s = 0.0

    async def get(self) -> EngineStats | None:
        """The newest; None if there are none yet. Raises `EngineError` if there will be none."""
        now = asyncio.get_running_loop().time()
        if self._latest is not None and now - self._since_s < FRESH_S:
            return self._latest
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._renew())
        done, _ = await asyncio.wait([self._asking], timeout=self._patience_s)
        return self._asking.result() if done else self._latest

    async def _renew(self) -> EngineStats:
        self._latest = await self._ask()
        self._since_s = asyncio.get_running_loop().time()
        return self._latest


def live_view(stats: EngineStats, targets: Counts[tuple[str, bool]], wait_s: float) -> dict[str, Any]:
    """What the page shows, as JSON: memory by precision and model, queues, attainment of targets."""
    return {
        "kv_bytes": stats.kv_bytes,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "predicted_wait_s": wait_s,
        "prompt_tokens": stats.num_prompt_tokens,
        "output_tokens": stats.num_output_tokens,
        "steps": stats.num_steps,
        "preemptions": stats.num_preemptions,
        "narrowed_pages": stats.kv_counts.narrowed_pages,
        "kv": {
            name: {"needed": usage.needed_bytes, "reserved": usage.reserved_bytes, "cached": usage.cached_bytes}
            for name, usage in stats.kv.items()
        },
        "models": {
            name: {"weights": model.weights, "kv": {own: part.reserved_bytes for own, part in model.kv.items()}}
            for name, model in stats.models.items()
        },
        "attainment": {
            slo: {"met": targets[slo, True], "all": targets[slo, True] + targets[slo, False]}
            for slo in ("ttft", "tpot")
        },
    }
