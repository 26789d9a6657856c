"""What a token sees depends on its position and its request's KV format alone.

Not on how its prompt was cut into chunks, whether it was prefilled or decoded, what was in the batch beside it, where
its pages lie, or what they held before. Everything is compared with one forward pass over the whole sequence: to the
last bits for formats that do not round, and for those that do within what a few numbers that round otherwise change.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from runner_cases import PAGE_SIZE, VOCAB, Feed, Found, World, expected_logprobs, make_request
from smooth_formats import smooth_formats

from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.pallas_kernels.implementation import default_implementation
from fineserve_jax.request.request import ScheduledChunk, SchedulerOutput

REAL = tuple(FORMATS)
SMOOTH = ("bent", "woven")
BY_LAYER = ("bent, woven", "woven, bent")
TOLERANCE = 1e-4  # of log-probabilities, for formats that do not round
FLIPS = 0.2  # of the format's distance from fp32, root mean square, for those that do
LENGTH = 3 * PAGE_SIZE + 5
CUTS = {
    "one chunk": (LENGTH,),
    "two chunks": (2 * PAGE_SIZE, PAGE_SIZE + 5),
    "a chunk a page": (PAGE_SIZE, PAGE_SIZE, PAGE_SIZE, 5),
    "token by token": (1,) * LENGTH,
    "a chunk, then tokens": (PAGE_SIZE + 7, *(1,) * (LENGTH - PAGE_SIZE - 7)),
    "tokens, then a chunk": (*(1,) * PAGE_SIZE, LENGTH - PAGE_SIZE),
}
every_cut = pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)


@pytest.fixture(scope="module")
def smooth():
    with smooth_formats() as names:
        yield names


@pytest.fixture(scope="module")
def smooth_world(smooth):
    return World(smooth, scores=True)


@pytest.fixture(scope="module")
def smooth_world_by_layer(smooth):
    return World(smooth, scores=True, recipes=BY_LAYER)


@pytest.fixture(scope="module")
def world():
    return World(REAL)


def tokens_of(seed: int, length: int = LENGTH) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, length).tolist())


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def assert_as_expected(feed: Feed, found: Found) -> None:
    assert sorted(found.logprobs) == (np.cumsum(feed.cuts) - 1).tolist()
    expected = expected_logprobs(feed.kv_precision, feed.tokens)
    error = np.stack([logprobs - expected[position] for position, logprobs in found.logprobs.items()])
    assert np.isfinite(error).all()
    if feed.kv_precision in (*SMOOTH, *BY_LAYER, "fp32"):
        assert np.abs(error).max() < TOLERANCE
    else:
        assert rms(error) < FLIPS * rms(expected - expected_logprobs("fp32", feed.tokens))
    for position, score in found.scores.items():
        assert abs(score - expected[position, feed.tokens[position + 1]]) < TOLERANCE


def assert_all_as_expected(world: World, feeds: list[Feed]) -> None:
    for feed, found in zip(feeds, world.feed(feeds), strict=True):
        assert_as_expected(feed, found)


@pytest.mark.parametrize("kv_precision", SMOOTH)
def test_the_smooth_formats_differ_from_fp32_by_far_more_than_the_tolerance(smooth_world, kv_precision):
    """Otherwise nothing here could fail."""
    distance = expected_logprobs(kv_precision, tokens_of(0)) - expected_logprobs("fp32", tokens_of(0))
    assert rms(distance) > 1000 * TOLERANCE


@every_cut
@pytest.mark.parametrize("kv_precision", SMOOTH)
def test_a_prompt_may_be_cut_in_any_way(smooth_world, kv_precision, cuts):
    """And every token of a chunk scores its successor."""
    smooth_world.spoil()
    feed = Feed(kv_precision, tokens_of(0), cuts)
    (found,) = smooth_world.feed([feed])
    assert_as_expected(feed, found)
    in_chunks = sum(count - 1 for count in cuts)
    assert len(found.scores) == in_chunks


@every_cut
@pytest.mark.parametrize("kv_precision", BY_LAYER)
def test_layers_may_be_kept_in_different_formats(smooth_world_by_layer, kv_precision, cuts):
    """Whole pages are encoded in one layer, and each token by itself in the other."""
    smooth_world_by_layer.spoil()
    assert_all_as_expected(smooth_world_by_layer, [Feed(kv_precision, tokens_of(0), cuts)])


@pytest.mark.parametrize("kv_precision", BY_LAYER)
def test_a_format_by_layer_is_told_from_those_that_it_is_made_of(smooth, kv_precision):
    """Otherwise a layer might be in the other's format unnoticed."""
    for other in {*smooth, "fp32", *BY_LAYER} - {kv_precision}:
        distance = expected_logprobs(kv_precision, tokens_of(0)) - expected_logprobs(other, tokens_of(0))
        assert rms(distance) > 1000 * TOLERANCE


@every_cut
@pytest.mark.parametrize("kv_precision", REAL)
def test_a_prompt_in_each_real_format_may_be_cut_in_any_way(world, kv_precision, cuts):
    world.spoil()
    assert_all_as_expected(world, [Feed(kv_precision, tokens_of(0), cuts)])


@pytest.mark.parametrize("cuts", [CUTS["token by token"], (PAGE_SIZE - 3, *(1,) * 20)], ids=["decode", "both"])
def test_requests_of_all_formats_share_a_batch(world, cuts):
    """Four prompts fill a step's chunk slots, and the other formats, and one of theirs, decode beside them."""
    world.spoil()
    prompts, others = REAL[-4:], (*REAL[:-4], REAL[-1])
    feeds = [Feed(name, tokens_of(seed, sum(cuts)), cuts) for seed, name in enumerate(prompts)]
    feeds += [Feed(name, tokens_of(9, len(cuts)), (1,) * len(cuts)) for name in others]
    assert_all_as_expected(world, feeds)


@st.composite
def mixes(draw, formats):
    """Up to four requests, each cut as a scheduler may: chunks that end at pages, the last anywhere, then tokens."""
    feeds = []
    for seed in range(draw(st.integers(1, 4))):
        chunks = [PAGE_SIZE] * draw(st.integers(0, 3)) + draw(st.sampled_from([[], [2], [PAGE_SIZE - 1]]))
        cuts = (*chunks, *[1] * draw(st.integers(0 if chunks else 1, 20)))
        feeds.append(Feed(draw(st.sampled_from(formats)), tokens_of(seed, sum(cuts)), cuts))
    return feeds


@settings(max_examples=15)
@given(feeds=mixes(SMOOTH))
def test_any_mix_of_prefill_and_decode(smooth_world, feeds):
    """Pages that earlier mixes left behind are used again as they are."""
    assert_all_as_expected(smooth_world, feeds)


@settings(max_examples=10, derandomize=True)
@given(feeds=mixes(REAL))
def test_any_mix_of_prefill_and_decode_of_the_real_formats(world, feeds):
    assert_all_as_expected(world, feeds)


@pytest.mark.skipif(default_implementation() != "cpu", reason="only its kernels leave rows of zeros out")
def test_what_pads_a_step_stays_zeros_through_all_layers(world):
    """Two decodes and a chunk that ends on its last page: rows and pages behind them are of nobody."""
    tokens = tokens_of(5)
    requests = [make_request(name, "int8", tokens) for name in "abc"]
    assert all(world.kv.grow(request, LENGTH) for request in requests)
    decodes = tuple(ScheduledChunk(request, LENGTH - 1, 1) for request in requests[:2])
    begun = world.runner.begin(SchedulerOutput(decodes, (ScheduledChunk(requests[2], 0, PAGE_SIZE),)))
    for request in requests:
        world.kv.release(request)
    rows = begun.spec.shape.rows
    zeros = (np.asarray(begun.stream.x) == 0).all(axis=-1)
    assert not zeros[[0, 1, *range(rows, rows + PAGE_SIZE)]].any()
    assert zeros[2:rows].all()
    assert zeros[rows + PAGE_SIZE :].all()


@settings(max_examples=5, derandomize=True)
@given(feeds=mixes((*SMOOTH, *BY_LAYER)))
def test_any_mix_of_formats_by_layer_and_others(smooth_world_by_layer, feeds):
    assert_all_as_expected(smooth_world_by_layer, feeds)
