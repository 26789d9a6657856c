"""How a model's pages are cut into units."""

import dataclasses

import pytest

from fineserve_jax.engine.page_shapes import MAX_PADDING, padding, page_geometry
from fineserve_jax.models import ModelConfig

HEADS = [(3, 64), (8, 128), (1, 64), (2, 32), (1, 256)]


def geometry(kv_heads: int, head_dim: int, page_size: int, **options):
    shape = ModelConfig("llama", 100, 64, 2, kv_heads, kv_heads, head_dim, 64)
    return page_geometry(shape, page_size, **options)


@pytest.mark.parametrize("page_size", [16, 32, 64])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_units_are_long_unless_that_wastes_much(heads, page_size):
    kv_heads, head_dim = heads
    chosen = geometry(kv_heads, head_dim, page_size)
    longer = dataclasses.replace(chosen, unit_words=2 * chosen.unit_words)
    if chosen.unit_words == 128:
        shorter = dataclasses.replace(chosen, unit_words=64)
        assert padding(chosen) <= MAX_PADDING or padding(chosen) <= padding(shorter)
    else:
        assert chosen.unit_words == 64
        assert MAX_PADDING < padding(longer) > padding(chosen)


def test_pages_of_32_tokens_of_a_small_model_lose_little():
    """3 heads of 64: a layer in int4 is 26.3 units of 128 words, 52.7 of 64."""
    assert geometry(3, 64, 32).unit_words == 64
    assert padding(geometry(3, 64, 32)) < 0.01


def test_on_a_tpu_a_unit_is_a_tile_whatever_it_wastes():
    assert geometry(1, 64, 16, tpu=True).unit_words == 1024
