"""Prometheus metrics of a batch job, for whoever scrapes them while it runs.

A step only leaves its statistics behind: they become metrics when somebody asks, on the thread that answers.
"""

import threading
from collections.abc import Iterator
from http.server import HTTPServer
from typing import Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.observers import JobObserver, JobStart, RowOutcome
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.entrypoints.metrics import RequestHistograms, engine_families
from fineserve_jax.errors import ConfigError

LOOPBACK = "127.0.0.1"


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
        self._requests = RequestHistograms(self._registry)
        self._registry.register(self)
        self._server, self._thread = _listen(port, host, self._registry)
        self.port: int = self._server.server_port

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
        self._requests.observe(
            outcome.model, metrics, outcome.prompt_tokens, outcome.output_tokens, outcome.finish_reasons
        )

    # -- on the thread that answers ----------------------------------------------------------------------------------

    def describe(self) -> list[Metric]:
        return []  # nothing is computed to be registered

    def collect(self) -> Iterator[Metric]:
        if (latest := self._latest) is not None:
            summary, stats = latest
            if stats.num_steps:  # else the engines are elsewhere
                yield from engine_families(stats)
            yield from _of_rows(summary, self._num_rows)


def _listen(port: int, host: str, registry: CollectorRegistry) -> tuple[HTTPServer, threading.Thread]:
    try:
        return start_http_server(port, addr=host, registry=registry)
    except (OSError, OverflowError) as error:
        what = getattr(error, "strerror", None) or error
        raise ConfigError(f"metrics_port={port} at {host} cannot be listened at: {what}; give another one") from None


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
