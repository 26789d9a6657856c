"""Metrics of a batch job, as Prometheus scrapes and parses them."""

import socket
import threading
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from observed_job import Clock, failed, outcome, play, stats_after
from prometheus_client.parser import text_string_to_metric_families

from fineserve_jax import ConfigError
from fineserve_jax.entrypoints.batch.metrics import MetricsServer
from fineserve_jax.entrypoints.batch.summary import BatchSummary


def scrape(server: MetricsServer) -> dict[str, float]:
    """Samples by name and labels, as Prometheus writes them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


@pytest.fixture
def server():
    with MetricsServer(0) as server:
        yield server


def test_before_a_step_there_is_nothing_to_tell(server):
    assert not [name for name in scrape(server) if "num_requests" in name]


def test_vllms_names_and_our_own(server):
    clock = Clock()
    summary = play(server, clock, 90)
    found = scrape(server)
    stats = stats_after(summary.output_tokens)
    assert found["vllm:num_requests_running"] == 8
    assert found["vllm:num_requests_waiting"] == 3
    assert found["vllm:num_preemptions_total"] == 4
    assert found["vllm:prompt_tokens_total"] == stats.num_prompt_tokens
    assert found["vllm:generation_tokens_total"] == summary.output_tokens
    assert found["vllm:prefix_cache_queries_total"] == 3 * summary.output_tokens
    assert found["vllm:prefix_cache_hits_total"] == summary.output_tokens
    assert found["vllm:kv_cache_usage_perc"] == pytest.approx(0.12)
    assert found['fineserve:kv_cache_bytes{kind="needed",kv_precision="int8"}'] == 2000
    assert found['fineserve:batch_rows_total{outcome="answered"}'] == summary.answered
    assert found['fineserve:batch_rows_total{outcome="error"}'] == summary.errors
    assert found["fineserve:batch_input_rows"] == 90
    reasons = [value for name, value in found.items() if name.startswith("vllm:request_success_total")]
    assert sum(reasons) == summary.answered
    assert found['vllm:e2e_request_latency_seconds_count{model_name="tiny"}'] == summary.answered
    assert found['vllm:e2e_request_latency_seconds_sum{model_name="tiny"}'] == pytest.approx(sum(clock.latencies))
    below = sum(latency <= 2.5 for latency in clock.latencies)
    assert found['vllm:e2e_request_latency_seconds_bucket{le="2.5",model_name="tiny"}'] == below
    assert found['vllm:request_generation_tokens_sum{model_name="tiny"}'] == summary.output_tokens


def test_errors_are_counted_by_their_code(server):
    summary = BatchSummary()
    for code in ("engine_fault", "invalid_request", "invalid_request"):
        summary.note_error(code)
        server.row(failed(1, code))
    server.step(summary, stats_after(1))
    found = scrape(server)
    assert found['fineserve:batch_errors_total{code="invalid_request"}'] == 2
    assert found['fineserve:batch_errors_total{code="engine_fault"}'] == 1


def test_samples_of_a_row_are_answers_of_their_own(server):
    server.row(outcome(0, output_tokens=(3, 5), finish_reasons=("stop", "length")))
    server.step(BatchSummary(), stats_after(8))
    found = scrape(server)
    assert found['vllm:request_generation_tokens_count{model_name="tiny"}'] == 2
    assert found['vllm:request_success_total{finished_reason="stop",model_name="tiny"}'] == 1
    assert found['vllm:request_time_per_output_token_seconds_sum{model_name="tiny"}'] == pytest.approx(1.5 / 4)


def test_a_step_computes_nothing(server):
    """Whatever statistics may cost to look at, they are looked at only when somebody asks."""
    looked = []

    class Lazy(SimpleNamespace):
        def __getattribute__(self, name):
            looked.append(name)
            return super().__getattribute__(name)

    server.step(BatchSummary(), Lazy(**vars(stats_after(5))))
    assert looked == []
    scrape(server)
    assert "num_running" in looked


def test_it_listens_at_the_loopback_address_only(server):
    assert server._server.server_address[0] == "127.0.0.1"


def test_a_port_that_cannot_be_had_is_refused(server):
    with pytest.raises(ConfigError, match=rf"metrics_port={server.port} at 127.0.0.1 cannot be listened at: .*in use"):
        MetricsServer(server.port)
    with pytest.raises(ConfigError, match=r"metrics_port=70000 .*; give another one"):
        MetricsServer(70_000)
    with pytest.raises(ConfigError, match=r"at 203.0.113.1 cannot be listened at"):
        MetricsServer(0, "203.0.113.1")


def test_it_ends_with_the_job():
    before = threading.active_count()
    with MetricsServer(0) as server:
        port = server.port
    assert threading.active_count() == before
    with pytest.raises(urllib.error.URLError):
        scrape(SimpleNamespace(port=port))
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
