"""Layers with a sliding window hold only their window: what requests take of the memory as they advance."""

import dataclasses

import pytest
from scheduler_cases import COST, FakeEngine, make_request

from fineserve_jax.engine.page_shapes import page_classes, page_geometry
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.models import LayerGroup, ModelConfig

PAGE_SIZE, CHUNK, WINDOW, LONGEST = 16, 256, 512, 8192
# Gemma 3 270M: every sixth of 18 layers attends to everything.
SHAPE = ModelConfig(
    family="gemma3",
    vocab_size=262144,
    hidden_size=640,
    num_layers=18,
    num_heads=4,
    num_kv_heads=1,
    head_dim=256,
    intermediate_size=2048,
    sliding_window=WINDOW,
    full_attention_layers=(5, 11, 17),
)
ALIKE = (LayerGroup(tuple(range(18)), None),)


def engine(groups: tuple[LayerGroup, ...], prefix_cache: str = "exact", num_units: int = 2**20) -> FakeEngine:
    geometry = page_geometry(SHAPE, PAGE_SIZE)
    classes = page_classes("m", geometry, ["bf16", "int8", "int4"], groups, CHUNK)
    lengths = [group.page_units for page_class in classes.values() for group in page_class.groups]
    allocator = SlabAllocator(num_units, choose_slab_units(lengths, num_units), unit_bytes=2 * geometry.unit_words)
    kv = KVManager(allocator, classes, prefix_cache=prefix_cache)
    costs = {"m": dataclasses.replace(COST, formats={name: COST.formats[name] for _, name in classes})}
    return FakeEngine(kv, costs, page_size=PAGE_SIZE, max_chunk_tokens=CHUNK)


def needed_bytes(tokens: int) -> float:
    """In bf16."""
    layer = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * 2
    return layer * (3 * tokens + 15 * min(tokens, WINDOW - 1))


def advance(engine: FakeEngine, tokens: int) -> None:
    """Steps until all requests have computed so many tokens."""
    while any(request.num_computed_tokens < tokens for request in engine.requests):
        assert engine.step() is not None


@pytest.mark.parametrize(("kv", "requests"), [("bf16", 2), ("int8", 2), ("int4", 8)])
def test_at_8192_tokens_hardly_more_is_reserved_than_needed(kv, requests):
    """Each length of page may leave a slab partly empty, and int4 has four with its residuals."""
    windowed = engine(SHAPE.layer_groups)
    for number in range(requests):
        windowed.add(make_request(number, LONGEST - 40, 400, kv=kv))
    advance(windowed, LONGEST)
    usage = measure_usage(windowed.kv)
    assert usage.cached_tokens == pytest.approx(requests * LONGEST, rel=0.03)
    if kv == "bf16":
        assert usage.needed_bytes == pytest.approx(requests * needed_bytes(LONGEST), rel=0.01)
    assert usage.reserved_bytes <= 1.05 * usage.needed_bytes


def test_without_groups_it_would_be_over_four_times_as_much():
    alike = engine(ALIKE, num_units=2**21)
    alike.add(make_request(0, LONGEST - 40, 100))
    advance(alike, LONGEST)
    assert measure_usage(alike.kv).reserved_bytes > 4 * needed_bytes(LONGEST)


def test_a_prompt_takes_no_more_than_its_window_and_a_step_meanwhile():
    windowed = engine(SHAPE.layer_groups, prefix_cache="off")
    request = windowed.add(make_request(0, LONGEST - 40, 10))
    most = 0
    while windowed.step() is not None:
        if windowed.kv.requests:
            local = windowed.kv.holds(request).groups[1]
            most = max(most, local.num_pages - local.num_dropped)
    assert most == (WINDOW + CHUNK) // PAGE_SIZE
    assert measure_usage(windowed.kv).reserved_bytes == 0


def test_a_prefix_is_shared_although_what_lies_behind_the_window_is_gone():
    windowed = engine(SHAPE.layer_groups)
    first = windowed.add(make_request(0, 2048, 10))
    windowed.drain()
    kv = windowed.kv
    local = [block for block in kv.pool.prefix_cache.by_handle.values() if block.page_class.group == 1]
    for block in local[: -WINDOW // PAGE_SIZE]:  # as if memory had been wanted for others
        kv.pool._evict([block.handle])
    again = make_request(1, 1, 10)
    again.token_ids = [*first.token_ids[:2048], 5]
    again.num_prompt_tokens, again.max_total_tokens = 2049, 2059
    assert kv.grow(again, again.num_tokens)
    assert again.num_computed_tokens == 2048
    assert kv.holds(again).groups[1].num_dropped == (2048 - WINDOW + 1) // PAGE_SIZE
    kv.release(again)
