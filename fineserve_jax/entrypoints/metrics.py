"""Prometheus metrics of an engine and of the requests that it answered, for a batch job and a server alike.

What vLLM's servers tell under a name is told here under the same name, `vllm:...`, so that dashboards made for them
show it; what they have no name for is `fineserve:...`.
"""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fineserve_jax.engine.outputs import RequestMetrics
from fineserve_jax.engine.stats import EngineStats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class RequestHistograms:
    """How long answers took and were, by model.

    Args:
        registry: where they are had.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token", SECONDS)
        self._tpot = self._histogram(
            "vllm:request_time_per_output_token_seconds", "Mean of a request's tokens behind the first", SECONDS
        )
        self._queue = self._histogram("vllm:request_queue_time_seconds", "From arrival to memory", SECONDS)
        self._total = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the end", SECONDS)
        self._prompt = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._output = self._histogram("vllm:request_generation_tokens", "Tokens of an answer", TOKENS)
        self._finished = Counter(
            "vllm:request_success",
            "Answers, by how they ended",
            ["model_name", "finished_reason"],
            registry=registry,
        )

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, ["model_name"], buckets=buckets, registry=self._registry)

    def observe(
        self,
        model: str,
        metrics: RequestMetrics,
        prompt_tokens: int,
        output_tokens: Sequence[int],
        finish_reasons: Sequence[str],
    ) -> None:
        """Counts an answered prompt; tokens and reasons are those of its samples."""
        self._ttft.labels(model).observe(metrics.ttft_s)
        self._queue.labels(model).observe(metrics.queue_s)
        self._total.labels(model).observe(metrics.total_s)
        self._prompt.labels(model).observe(prompt_tokens)
        if (tpot_s := time_per_output_token_s(metrics, output_tokens)) is not None:
            self._tpot.labels(model).observe(tpot_s)
        for count, reason in zip(output_tokens, finish_reasons, strict=True):
            self._output.labels(model).observe(count)
            self._finished.labels(model, reason).inc()


def time_per_output_token_s(metrics: RequestMetrics, output_tokens: Sequence[int]) -> float | None:
    """Seconds for each token behind the first, of the longest sample; None if that has no such."""
    most = max(output_tokens, default=0)
    return (metrics.total_s - metrics.ttft_s) / (most - 1) if most > 1 else None


def engine_families(stats: EngineStats) -> Iterator[Metric]:
    """How the engine and its memory stand."""
    yield from _of_engine(stats)
    yield from _of_memory(stats)


def _of_engine(stats: EngineStats) -> Iterator[Metric]:
    yield GaugeMetricFamily("vllm:num_requests_running", "Requests that hold memory", stats.num_running)
    yield GaugeMetricFamily("vllm:num_requests_waiting", "Requests that wait for memory", stats.num_waiting)
    yield CounterMetricFamily("vllm:num_preemptions", "Requests that lost their memory", stats.num_preemptions)
    yield CounterMetricFamily("vllm:prompt_tokens", "Prompt tokens computed", stats.num_prompt_tokens)
    yield CounterMetricFamily("vllm:generation_tokens", "Tokens sampled", stats.num_output_tokens)
    counts = stats.kv_counts
    yield CounterMetricFamily("vllm:prefix_cache_queries", "Tokens looked up in the prefix cache", counts.asked_tokens)
    yield CounterMetricFamily("vllm:prefix_cache_hits", "Tokens found in the prefix cache", counts.hit_tokens)
    yield CounterMetricFamily("fineserve:steps", "Steps of the engine", stats.num_steps)
    yield CounterMetricFamily("fineserve:compilations", "Programs compiled", stats.num_compilations)
    yield CounterMetricFamily("fineserve:narrowed_pages", "Pages narrowed", counts.narrowed_pages)
    yield CounterMetricFamily("fineserve:evicted_pages", "Cached pages evicted", counts.evicted_pages)


def _of_memory(stats: EngineStats) -> Iterator[Metric]:
    reserved = sum(usage.reserved_bytes for usage in stats.kv.values())
    yield GaugeMetricFamily(
        "vllm:kv_cache_usage_perc", "Share of the KV memory in use, 1 is all", reserved / stats.kv_bytes
    )
    by_precision = GaugeMetricFamily(
        "fineserve:kv_cache_bytes",
        "KV memory by precision: needed by cached tokens, reserved for them, and cached for others",
        labels=["kv_precision", "kind"],
    )
    for name, usage in stats.kv.items():
        by_precision.add_metric([name, "needed"], usage.needed_bytes)
        by_precision.add_metric([name, "reserved"], usage.reserved_bytes)
        by_precision.add_metric([name, "cached"], usage.cached_bytes)
    yield by_precision
