"""What a plan looks like to the device: who writes where, in which format, and what is padding."""

import numpy as np
import pytest
from runner_cases import CONFIG, GEOMETRY, MAX_SEQ_LEN, PAGE_SIZE, make_kv, make_request, pages_of, tiny_model

from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.request.request import ScheduledChunk, SchedulerOutput
from fineserve_jax.runner.inputs import NO_TOKEN, build_inputs
from fineserve_jax.runner.shapes import MIN_ROWS, StepShape, StepSpec, chunk_buckets, pick, row_buckets

NAMES = tuple(FORMATS)
ROWS, SLOTS = 8, 64


def spec(chunk_tokens: int = SLOTS) -> StepSpec:
    model, _ = tiny_model()
    return StepSpec(model, GEOMETRY, NAMES, StepShape(ROWS, chunk_tokens), MAX_SEQ_LEN // PAGE_SIZE)


def grown(kv, name: str, kv_precision: str, num_tokens: int):
    request = make_request(name, kv_precision, [(i * 7) % CONFIG.vocab_size for i in range(num_tokens)])
    assert kv.grow(request, num_tokens)
    return request


def test_a_decoded_token_goes_to_its_page_or_to_the_residual():
    kv = make_kv()
    int8, int4 = grown(kv, "a", "int8", 40), grown(kv, "b", "int4", 40)
    inputs, sampled = build_inputs(
        spec(0), SchedulerOutput((ScheduledChunk(int8, 39, 1), ScheduledChunk(int4, 39, 1)), ()), kv
    )
    decode, (group,) = inputs.decode, inputs.groups
    assert sampled == [int8, int4]
    assert decode.tokens[:2].tolist() == [int8.token_ids[39], int4.token_ids[39]]
    assert decode.positions[:2].tolist() == [39, 39]
    assert group.decode_pages[:2].tolist() == [kv.page_unit(int8, 2), kv.residual_unit(int4)]
    assert [NAMES[i] for i in decode.format_ids[:2]] == ["int8", "int8"]
    assert inputs.sample_slots[:2].tolist() == [0, 1]
    assert (inputs.sample_slots[2:] == NO_TOKEN).all()
    assert (decode.tokens[2:] == NO_TOKEN).all()
    assert inputs.chunk is None
    assert (group.decode_pages[2:] == NOWHERE).all()
    assert not inputs.closing_counts.any()


@pytest.mark.parametrize("position", [0, 14, 15, 16, 31])
def test_a_residual_is_closed_by_the_token_that_fills_it(position):
    kv = make_kv()
    request = grown(kv, "a", "int4", position + 1)
    inputs, _ = build_inputs(spec(0), SchedulerOutput((ScheduledChunk(request, position, 1),), ()), kv)
    (group,) = inputs.groups
    if position % PAGE_SIZE == PAGE_SIZE - 1:
        assert inputs.closing_counts.tolist() == [1]
        assert (group.closing_sources[0, 0], group.closing_targets[0, 0]) == (
            kv.residual_unit(request),
            kv.page_unit(request, position // PAGE_SIZE),
        )
    else:
        assert inputs.closing_counts.tolist() == [0]


def test_chunks_lie_side_by_side_from_page_boundaries_on():
    kv = make_kv()
    int8, int4 = grown(kv, "a", "int8", 30), grown(kv, "b", "int4", 40)
    inputs, sampled = build_inputs(
        spec(), SchedulerOutput((), (ScheduledChunk(int8, 16, 14), ScheduledChunk(int4, 16, 24))), kv
    )
    chunk = inputs.chunk
    assert sampled == [int8, int4]
    assert chunk.chunk_of_page.tolist() == [0, 1, 1, -1]
    assert inputs.groups[0].chunk_pages.tolist() == [
        kv.page_unit(int8, 1),
        kv.page_unit(int4, 1),
        kv.residual_unit(int4),
        NOWHERE,
    ]
    assert [NAMES[i] for i in chunk.written_format_ids[:3]] == ["int8", "int4", "int8"]
    assert [NAMES[i] for i in chunk.newest_format_ids[:3]] == ["int8", "int8", "int8"]
    assert [NAMES[i] for i in chunk.full_format_ids[:3]] == ["int8", "int4", "int4"]
    assert chunk.tokens[:14].tolist() == int8.token_ids[16:]
    assert chunk.tokens[16:40].tolist() == int4.token_ids[16:]
    assert (chunk.tokens[[14, 15, *range(40, SLOTS)]] == NO_TOKEN).all()
    assert chunk.positions[:14].tolist() == list(range(16, 30))
    assert chunk.positions[16:40].tolist() == list(range(16, 40))
    assert inputs.sample_slots[:2].tolist() == [ROWS + 13, ROWS + 39]


def test_a_chunk_before_a_prompts_last_samples_nothing():
    kv = make_kv()
    request = grown(kv, "a", "int4", 40)
    inputs, sampled = build_inputs(spec(), SchedulerOutput((), (ScheduledChunk(request, 0, 32),)), kv)
    assert sampled == []
    assert inputs.groups[0].chunk_pages.tolist() == [*pages_of(kv, request), NOWHERE, NOWHERE]


def cached_tokens(tiles) -> dict[str, list[tuple[list[int], int, int]]]:
    """Format -> (pages, tokens, position of the first) of each tile's first segment."""
    columns = (tiles.pages, tiles.num_tokens, tiles.positions)
    parts = list(zip(*(column[:, 0].tolist() for column in columns), strict=True))
    found = {NAMES[f]: parts[slice(*tiles.starts[f : f + 2])] for f in range(len(NAMES))}
    return {name: tiles for name, tiles in found.items() if tiles}


def test_cached_tokens_are_those_before_the_work():
    """In int4: the full pages, and in int8 what the residual page holds; both at their positions."""
    kv = make_kv()
    request = grown(kv, "a", "int4", 40)
    inputs, _ = build_inputs(spec(0), SchedulerOutput((ScheduledChunk(request, 39, 1),), ()), kv)
    tiles = inputs.groups[0].decode_tiles
    padding = [0] * (tiles.pages.shape[2] - 1)
    assert cached_tokens(tiles) == {
        "int4": [([*pages_of(kv, request), *padding[1:]], 32, 0)],
        "int8": [([kv.residual_unit(request), *padding], 7, 32)],
    }
    assert tiles.query_counts.tolist() == [1] + [0] * (ROWS - 1)
    assert tiles.query_positions[0] == 39


def test_a_chunks_queries_follow_what_is_cached():
    kv = make_kv()
    first, second = grown(kv, "a", "int8", 30), grown(kv, "b", "int8", 40)
    chunks = (ScheduledChunk(first, 0, 30), ScheduledChunk(second, 16, 24))
    tiles = build_inputs(spec(), SchedulerOutput((), chunks), kv)[0].groups[0].chunk_tiles
    assert cached_tokens(tiles) == {"int8": [([kv.page_unit(second, 0), *[0] * (tiles.pages.shape[2] - 1)], 16, 0)]}
    blocks = [(tiles.query_starts[b], tiles.query_counts[b], tiles.query_positions[b]) for b in (0, 1)]
    assert blocks == [(0, 30, 0), (32, 24, 16)]
    assert not tiles.query_counts[2:].any()


@pytest.mark.parametrize("most", [1, 8, 9, 100])
def test_row_buckets_double_until_they_hold_everyone(most):
    buckets = row_buckets(most)
    assert buckets[0] == MIN_ROWS
    assert buckets[-1] >= most
    assert len(buckets) == 1 or buckets[-2] < most
    assert np.ptp(np.diff(np.log2(buckets))) == 0 if len(buckets) > 2 else True
    assert pick(buckets, most) == buckets[-1]
    assert row_buckets(most, single=True) == (1, *buckets)


@pytest.mark.parametrize("most", [16, 64, 256, 512, 1024, 4096])
def test_chunk_buckets_are_whole_pages_up_to_the_most(most):
    buckets = chunk_buckets(most, PAGE_SIZE)
    assert buckets[-1] == most
    assert all(bucket % PAGE_SIZE == 0 for bucket in buckets)
    assert list(buckets) == sorted(set(buckets))
    assert pick(buckets, 1) == buckets[0] <= max(64, PAGE_SIZE)
    assert all(pick(buckets, size) < 2 * size for size in range(buckets[0] // 2 + 1, most + 1)), "mostly padding"
