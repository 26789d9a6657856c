"""The Mosaic kernels that write, in TPU interpret mode on a CPU, leave the same arena as XLA's writes.

In that mode copies take place when they are waited for, and reading what no copy has written gives no sensible words.
"""

import pytest
from kernel_cases import ALL_FORMATS, FAR_AWAY, make_geometry
from write_cases import (
    KERNEL_PAGES,
    SAME_ROTATION,
    TOKEN_FORMATS,
    Arena,
    Requantized,
    check_equal,
    check_write_pages,
    check_write_tokens,
    format_cases,
    pair_cases,
    requantize,
    write_tokens,
)

from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.pallas_kernels.mosaic_tpu import page_writes, token_writes

GEOMETRIES = [
    make_geometry(kv_heads=3, head_dim=96, page_size=32, tpu=True),
    make_geometry(kv_heads=3, head_dim=64, tpu=True),
    make_geometry(kv_heads=2, head_dim=128, page_size=32, tpu=True),
]
SMALL = GEOMETRIES[1]


@pytest.fixture
def recompiled():
    """For tests that change a module's constant: jit knows nothing of those."""
    clear = [write_tokens.clear_cache, requantize.clear_cache]  # type: ignore[attr-defined]
    for each in clear:
        each()
    yield
    for each in clear:
        each()


@format_cases(list(ALL_FORMATS.values()), GEOMETRIES)
def test_pages(kv_format, geometry):
    check_write_pages("mosaic_tpu", kv_format, geometry)


@format_cases(TOKEN_FORMATS, GEOMETRIES)
def test_tokens(kv_format, geometry):
    check_write_tokens("mosaic_tpu", kv_format, geometry)


def test_as_many_tokens_as_there_are(monkeypatch, recompiled):
    """Layers one by one, so that buffers are used again: 0, 2, 6 and 12 steps with 4 buffers."""
    monkeypatch.setattr(token_writes, "GROUP_UNITS", 1)
    for num_tokens in (0, 1, 3, 6):
        pages = Arena(SMALL).places[:KERNEL_PAGES].copy()
        pages[num_tokens:] = FAR_AWAY
        check_write_tokens("mosaic_tpu", get_format("int8"), SMALL, pages[::-1], range(KERNEL_PAGES))


@pair_cases(SAME_ROTATION[:2], GEOMETRIES)
def test_pages_change_format(source, target, geometry):
    check_equal(Requantized("mosaic_tpu", source, target, geometry))


@pair_cases([("int4", "bf16"), ("bf16", "int4"), ("int8", "int4")], GEOMETRIES)
def test_pages_change_format_and_rotation(source, target, geometry):
    """XLA does the arithmetic here too, so nothing differs."""
    check_equal(Requantized("mosaic_tpu", source, target, geometry))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_only_so_many_pages_change_format(count):
    check_equal(Requantized("mosaic_tpu", get_format("bf16"), get_format("int8"), GEOMETRIES[0], count))


@pytest.mark.parametrize("layers", [1, 8])
def test_pages_change_format_in_several_steps(layers, monkeypatch, recompiled):
    """A layer of a page at a time; four pages at a time."""
    values_of_layer = 2 * SMALL.kv_heads * SMALL.page_size * SMALL.head_dim
    monkeypatch.setattr(page_writes, "VALUES_AT_A_TIME", layers * values_of_layer)
    check_equal(Requantized("mosaic_tpu", get_format("bf16"), get_format("int8"), SMALL, count=5))
