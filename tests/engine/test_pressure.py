"""When memory is short, older tokens of requests that allow it are narrowed, and others notice nothing."""

import numpy as np
import pytest

from fineserve_jax.errors import RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.usage import count_events
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

LONG = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=3)
PROMPTS = [np.random.default_rng(i).integers(1, 96, 50 + i).tolist() for i in range(8)]
FORMATS = ["bf16", "auto", "int8", "auto", "auto", "int4", "auto", "auto"]
# One size for all engines: programs are compiled for an arena's size.
MEMORY = {"kv_memory": "600KB", "kv_precision": "int4"}


def run_alone(engine, formats):
    """The requests, served one after the other, with memory enough for each."""
    sampled = []
    for prompt, name in zip(PROMPTS, formats, strict=True):
        sampled.append(engine.add_request(prompt, LONG, RequestOptions(kv_precision=name)))
        while engine.has_unfinished:
            engine.step()
    assert engine.kv.num_narrowed_pages == engine.stats().num_preemptions == 0
    return sampled


def run(engine, formats=FORMATS, **fields):
    """The requests, served to the end."""
    requests = [
        engine.add_request(prompt, LONG, RequestOptions(kv_precision=name, **(fields if name == "auto" else {})))
        for prompt, name in zip(PROMPTS, formats, strict=True)
    ]
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    return requests


def test_narrowing_takes_the_place_of_preemption_and_leaves_others_alone(make_engine):
    roomy = run_alone(make_engine(**MEMORY), FORMATS)
    engine = make_engine(**MEMORY)
    squeezed = run(engine)
    assert engine.kv.num_narrowed_pages > 0
    assert engine.stats().num_preemptions == 0
    for request, expected, name in zip(squeezed, roomy, FORMATS, strict=True):
        assert sum(request.kv_tokens.values()) == request.num_tokens - 1
        if name != "auto":
            assert request.output_token_ids == expected.output_token_ids
            assert set(request.kv_tokens) <= {name, get_format(name).residual or name}
    fixed = make_engine(**MEMORY)
    run(fixed, ["bf16" if name == "auto" else name for name in FORMATS])
    assert fixed.stats().num_preemptions > 0, "without narrowing the memory was meant to be too small"


def test_the_newest_pages_stay_wide_and_the_floor_is_kept(make_engine):
    engine = make_engine(**MEMORY)
    narrowed = [request for request in run(engine, min_kv_precision="int8") if len(request.kv_tokens) > 1]
    narrowed = [request for request in narrowed if request.kv_precision == "bf16"]
    assert narrowed
    for request in narrowed:
        assert list(request.kv_tokens) == ["int8", "bf16"]
        assert request.kv_tokens["bf16"] > 16  # what is being written, and at least one full page


@pytest.mark.parametrize("preemption", ["swap", "recompute"])
def test_tokens_do_not_depend_on_how_a_preempted_request_comes_back(make_engine, preemption):
    formats = ["bf16", "int8", "fp32", "bf16", "fp32", "int4", "fp32", "bf16"]
    expected = run_alone(make_engine(**MEMORY), formats)
    engine = make_engine(**MEMORY, preemption=preemption)
    found = run(engine, formats)
    assert engine.stats().num_preemptions > 0, "the memory was meant to be too small"
    assert (count_events(engine.kv).saved_requests > 0) == (preemption == "swap")
    assert [r.output_token_ids for r in found] == [r.output_token_ids for r in expected]
    assert engine.kv.host.used_bytes == 0


@pytest.mark.slow
def test_nothing_is_compiled_after_warm_up_even_under_pressure(make_engine):
    engine = make_engine(**MEMORY, preemption="swap")
    engine.warm_up(["auto"])
    before = engine.stats().num_compilations
    run(engine)
    assert engine.kv.num_narrowed_pages > 0
    assert engine.stats().num_compilations == before


def test_a_floor_that_is_wider_than_the_precision_is_refused(make_engine):
    with pytest.raises(RequestError, match="min_kv_precision='bf16' is wider than kv_precision='int8'"):
        make_engine().add_request(PROMPTS[0], LONG, RequestOptions(kv_precision="int8", min_kv_precision="bf16"))
