"""Prometheus metrics of a batch job, for whoever scrapes them while it runs.

What vLLM's servers tell under a name is told here under the same name, `vllm:...`, so that dashboards made for them
show it; what they have no name for is `fineserve:...`. A step only leaves its statistics behind: they become metrics
when somebody asks, on the thread that answers.
"""

import threading
from collections.abc import Iterator
from http.server import HTTPServer
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fineserve_jax.batch.observers import JobObserver, JobStart, RowOutcome
from fineserve_jax.batch.summary import BatchSummary
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.errors import ConfigError

LOOPBACK = "127.0.0.1"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class MetricsServer(JobObserver, Collector):
    """Answers `GET /metrics` while it is entered, for the job that it observes.

    Args:
        port: where to listen; 0: any that is free.
        host: address to listen at.

    Raises:
        ConfigError: the port cannot be had.

    Attributes:
        port: where it listens.
    """

    def __init__(self, port: int, host: str = LOOPBACK) -> None:
        self._registry = CollectorRegistry()
        self._latest: tuple[BatchSummary, EngineStats] | None = None
        self._num_rows: int | None = None
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
            registry=self._registry,
        )
        self._registry.register(self)
        self._server, self._thread = _listen(port, host, self._registry)
        self.port: int = self._server.server_port

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, ["model_name"], buckets=buckets, registry=self._registry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    # -- on the job's thread ---------------------------------------------------------------------------------------

    def began(self, start: JobStart) -> None:
        self._num_rows = start.num_rows

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        self._latest = summary, stats

    def row(self, outcome: RowOutcome) -> None:
        if (metrics := outcome.metrics) is None:
            return
        self._ttft.labels(outcome.model).observe(metrics.ttft_s)
        self._queue.labels(outcome.model).observe(metrics.queue_s)
        self._total.labels(outcome.model).observe(metrics.total_s)
        self._prompt.labels(outcome.model).observe(outcome.prompt_tokens)
        if (most := max(outcome.output_tokens, default=0)) > 1:
            self._tpot.labels(outcome.model).observe((metrics.total_s - metrics.ttft_s) / (most - 1))
        for count, reason in zip(outcome.output_tokens, outcome.finish_reasons, strict=True):
            self._output.labels(outcome.model).observe(count)
            self._finished.labels(outcome.model, reason).inc()

    # -- on the thread that answers ----------------------------------------------------------------------------------

    def describe(self) -> list[Metric]:
        return []  # nothing is computed to be registered

    def collect(self) -> Iterator[Metric]:
        if (latest := self._latest) is not None:
            summary, stats = latest
            if stats.num_steps:  # else the engines are elsewhere
                yield from _of_engine(stats)
                yield from _of_memory(stats)
            yield from _of_rows(summary, self._num_rows)


def _listen(port: int, host: str, registry: CollectorRegistry) -> tuple[HTTPServer, threading.Thread]:
    try:
        return start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        what = getattr(error, "strerror", None) or error
        raise ConfigError(f"metrics_port={port} at {host} cannot be listened at: {what}; give another one") from None


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


def _of_rows(summary: BatchSummary, num_rows: int | None) -> Iterator[Metric]:
    rows = CounterMetricFamily("fineserve:batch_rows", "Rows of the job, by what became of them", labels=["outcome"])
    for outcome, count in (("answered", summary.answered), ("error", summary.errors), ("skipped", summary.skipped)):
        rows.add_metric([outcome], count)
    yield rows
    errors = CounterMetricFamily("fineserve:batch_errors", "Rows that failed, by the error's code", labels=["code"])
    for code, count in tuple(summary.error_kinds.items()):
        errors.add_metric([code], count)
    yield errors
    if num_rows is not None:
        yield GaugeMetricFamily("fineserve:batch_input_rows", "Rows of all inputs", num_rows)
