"""From what a request asks for to the format it starts in and the one it may be narrowed to."""

import pytest

from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

SHORT = SamplingParams(max_tokens=4)


def started(engine, **how):
    request = engine.add_request([1, 2, 3], SHORT, RequestOptions(**how))
    return request.kv_precision, request.min_kv_precision


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        (("fp32", "bf16", "int8", "int4"), ("bf16", "int4")),
        (("fp16", "int4", "bf16"), ("bf16", "int4")),
        (("int8", "int4"), ("int8", "int4")),
        (("int8",), ("int8", None)),
        (("bf16", "int3"), ("bf16", "int3")),
    ],
)
def test_auto_starts_as_wide_as_16_bits_and_goes_down_to_the_narrowest(make_engine, formats, expected):
    assert started(make_engine(kv_formats=formats, kv_precision=formats[0]), kv_precision="auto") == expected


def test_pairs_and_int3_are_served_where_they_are_named(make_engine):
    engine = make_engine(kv_formats=("bf16", "k8v4"))
    assert started(engine, kv_precision="k8v4") == ("k8v4", None)
    assert started(engine, kv_precision="auto") == ("bf16", "k8v4")
    assert started(make_engine(kv_precision="k8v4", kv_formats=None)) == ("k8v4", None)
    assert started(make_engine(kv_formats=None), kv_precision="auto") == ("bf16", "int4")
    with pytest.raises(RequestError, match=r"'k8v4' is not served; choose one of fp32, .*, or name it in kv_formats"):
        started(make_engine(), kv_precision="k8v4")


@pytest.mark.slow
def test_requests_in_pairs_and_int3_are_answered_side_by_side(make_engine):
    """As by themselves; their prompts fill pages, and `kbf16v4` keeps its newest tokens in another pair."""
    names, prompt = ("k8v4", "int3", "kbf16v4"), list(range(1, 60))
    engine = make_engine(kv_formats=names, kv_precision="k8v4")

    def answers(*formats):
        requests = [engine.add_request(prompt, SHORT, RequestOptions(kv_precision=name)) for name in formats]
        while engine.has_unfinished:
            engine.step()
        assert [request.error for request in requests] == [None] * len(formats)
        assert [set(request.kv_tokens) for request in requests] == [
            {name, get_format(name).residual or name} for name in formats
        ]
        found = [request.output_token_ids for request in requests]
        for request in requests:
            engine.release(request)
        return found

    alone = [answers(name)[0] for name in names]
    assert answers(*names) == alone
    assert {len(tokens) for tokens in alone} == {4}


def test_a_request_may_name_its_floor_or_has_the_engines(make_engine):
    engine = make_engine(min_kv_precision="int8")
    assert started(engine) == ("bf16", "int8")
    assert started(engine, kv_precision="bf16", min_kv_precision="int4") == ("bf16", "int4")
    assert started(engine, kv_precision="int4") == ("int4", None)
    assert started(engine, kv_precision="auto") == ("bf16", "int8")


def test_auto_starts_narrower_when_the_request_would_not_fit_otherwise(make_engine):
    engine = make_engine(kv_memory="190KB", kv_precision="int4", max_seq_len=400)
    longest = engine.kv.max_tokens_alone(engine.model.name, "bf16")
    assert longest < engine.max_seq_len
    for more, starts_in in ((0, {"bf16"}), (1, {"int8", "int4"})):
        sampling = SamplingParams(max_tokens=longest + more - 100)
        assert engine.add_request([1] * 100, sampling, RequestOptions(kv_precision="auto")).kv_precision in starts_in


def test_every_format_that_a_page_may_pass_through_has_a_cost(make_engine):
    """Narrowed from bf16 to int4, pages are in int8 for a while if int4 keeps its newest tokens in that."""
    engine = make_engine(kv_formats=("bf16", "int4"), kv_precision="auto")
    (profile,) = engine.scheduler.profiles.values()
    assert set(profile.model.formats) == {kv_format for _, kv_format in engine.kv.classes} > {"bf16", "int4"}


def test_what_cannot_be_honoured_is_refused(make_engine):
    with pytest.raises(ConfigError, match="min_kv_precision='bf16' is wider than kv_precision='int8'"):
        make_engine(kv_precision="int8", min_kv_precision="bf16")
    with pytest.raises(ConfigError, match="swap_memory=100 is not used"):
        make_engine(preemption="recompute", swap_memory=100)
    with pytest.raises(ConfigError, match="preemption='swap' needs host memory"):
        make_engine(preemption="swap", swap_memory=0)
    with pytest.raises(ConfigError, match="there is no folder /nonexistent"):
        make_engine(step_profile="/nonexistent/steps.json")
    with pytest.raises(RequestError, match="slab_policy='uniform'"):
        started(make_engine(slab_policy="uniform"), kv_precision="auto")
    engine = make_engine()
    other = engine.add_request([4, 5, 6], SHORT)
    with pytest.raises(RequestError, match="is of another prompt or model"):
        engine.add_request([1, 2, 3], SHORT, fork_of=other)
