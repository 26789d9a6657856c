"""Whichever kernels the engine calls, the tokens are the same. On a CPU the GPU's and the TPU's are interpreted."""

import pytest
from engine_cases import serve

from fineserve_jax.engine.build import kernel_implementation
from fineserve_jax.errors import ConfigError
from fineserve_jax.pallas_kernels.cpu import library
from fineserve_jax.request.sampling_params import SamplingParams

FORMATS = ("fp32", "int8", "int4")
PROMPTS = [list(range(1, 38)), list(range(40, 45)), list(range(7, 60, 2))]


def tokens(make_engine) -> list[list[int]]:
    """A prompt in each format at once: chunks, decoding across a page's end, and int4 pages that close on the way."""
    engine = make_engine(kv_formats=FORMATS, kv_precision="int8", max_batch_size=4, max_chunk_tokens=32)
    requests = serve(engine, PROMPTS, list(FORMATS), SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
    return [request.output_token_ids for request in requests]


@pytest.mark.slow
@pytest.mark.parametrize("kernels", ["triton", "mosaic_tpu"])
def test_a_whole_generation_through_the_kernels_gives_the_tokens_of_xla(make_engine, monkeypatch, kernels):
    expected = tokens(make_engine)
    monkeypatch.setenv("FINESERVE_ATTENTION", kernels)
    assert tokens(make_engine) == expected


def test_unknown_kernels_are_refused_before_anything_is_allocated(make_engine, monkeypatch):
    monkeypatch.setenv("FINESERVE_ATTENTION", "cuda")
    with pytest.raises(ConfigError, match=r"FINESERVE_ATTENTION='cuda'.*xla, cpu, triton, mosaic_tpu"):
        make_engine()


def test_where_compiled_kernels_are_missing_it_is_said(monkeypatch, caplog):
    monkeypatch.delenv("FINESERVE_ATTENTION", raising=False)
    monkeypatch.setattr(library, "why_unavailable", lambda: "they were not built")
    assert kernel_implementation() == "xla"
    assert "they were not built; until then XLA does their work, several times slower" in caplog.text
    caplog.clear()
    monkeypatch.setenv("FINESERVE_ATTENTION", "xla")
    assert kernel_implementation() == "xla"
    assert not caplog.text
