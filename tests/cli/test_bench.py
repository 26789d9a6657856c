"""`fineserve-jax bench`, and what it measures with."""

import json

import numpy as np
import pytest

from fineserve_jax import Engine, EngineConfig
from fineserve_jax.engine import processor
from fineserve_jax.engine.bench import percentiles, random_prompts, serve_at_once
from fineserve_jax.loaders import load_model

SMALL = ["--requests", 3, "--prompt-tokens", 9, "--output-tokens", 5, "--rounds", 2]


@pytest.fixture
def bench(run, tiny_model):
    """Runs the command on the tiny model; as `run`."""
    memory = ["--kv-memory", "8MiB", "--max-chunk-tokens", 16]
    return lambda *options: run("bench", "--model", tiny_model, *memory, *options)


def test_rates_and_latencies_of_each_case_are_printed(bench):
    status, out, err = bench(*SMALL, "--kv-precision", "bf16", "bf16+int4", "--json")
    assert status == 0
    assert err.splitlines() == ["compiling, 2 cases", "round 1 of 2", "round 2 of 2"]
    result = json.loads(out)
    assert list(result["cases"]) == ["bf16", "bf16+int4"]
    assert result["compilations_after_warm_up"] == 0
    assert "cores" in result["processor"]
    for figures in result["cases"].values():
        for name in ("ttft_s", "itl_s", "e2e_s"):
            assert 0 < figures[name]["p50"] <= figures[name]["p90"] <= figures[name]["p99"]
        assert all(figures["ttft_s"][q] < figures["e2e_s"][q] for q in ("p50", "p90", "p99"))
        assert all(figures[f"{kind}_tokens_per_s"] > 0 for kind in ("prefill", "decode", "output"))
    _, out, _ = bench(*SMALL, "--kv-precision", "bf16")
    assert "between tokens" in out
    assert "0 programs were compiled later" in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output-tokens", 1], "--output-tokens 1: give at least 2"),
        (["--prompt-tokens", 0], "--prompt-tokens 0: give at least 1"),
        (["--kv-precision", "int5"], "int5"),
        (["--kv-precision", "bf16+int5", *SMALL], "int5"),
    ],
)
def test_what_cannot_be_measured_is_refused(bench, options, message):
    status, out, err = bench(*options)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert message in err


def test_every_token_is_timed(tiny_model):
    config = EngineConfig(
        kv_memory="8MiB", max_seq_len=24, max_batch_size=2, max_chunk_tokens=16, prefix_cache="off", weights="fp32"
    )
    engine = Engine(load_model(tiny_model, "fp32"), config)
    prompts = random_prompts(engine.model.config.vocab_size, 3, 7)
    served = serve_at_once(engine, prompts, ["bf16", "int8"], 6)
    assert (served.prompt_tokens, served.first_s.shape, served.gaps_s.shape) == (21, (3,), (15,))
    np.testing.assert_allclose(served.first_s + served.gaps_s.reshape(3, 5).sum(1), served.total_s)
    assert (served.gaps_s > 0).all()
    # The third waits until one of the first two has ended, so that there is no time at which all decode.
    assert served.decode_tokens_per_s is None
    assert not engine.has_unfinished
    assert not engine.detokenizers
    two = serve_at_once(engine, prompts[:2], ["bf16"], 6)
    assert two.decode_tokens == pytest.approx(10, abs=2)  # perhaps one prompt was computed a step before the other


def test_percentiles_are_of_all_rounds_together():
    assert percentiles([np.arange(0.0, 51.0), np.arange(51.0, 101.0)]) == {"p50": 50.0, "p90": 90.0, "p99": 99.0}


def test_a_processor_is_named_with_what_it_can_do(monkeypatch, tmp_path):
    (tmp_path / "cpuinfo").write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 avx512f\n\nmodel name\t: Some CPU\n")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert processor.processor_name().startswith("Some CPU, ")
    assert processor.processor_name().endswith(" cores, avx2 avx512f")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert " cores" in processor.processor_name()
