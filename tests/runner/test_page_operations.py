"""Page operations on a real arena: what each does, that many do what they would do one by one, and nothing else."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fineserve_jax.engine.page_shapes import page_classes
from fineserve_jax.kv.operations import Copy, HostPages, Load, Save
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.operations import requantize, write_pages
from fineserve_jax.pallas_kernels.specs import WriteSpec
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.page_operations import COPIES, TRANSFERRED_PAGES, PageOperations

MODEL = "tiny"
GEOMETRY = PageGeometry(
    num_layers=2, kv_heads=1, head_dim=32, page_size=16, unit_words=choose_unit_words(head_dim=32, page_size=16)
)
CLASSES = page_classes(MODEL, GEOMETRY, ["bf16", "int8", "int4"])
BF16, INT8, INT4 = (CLASSES[MODEL, name] for name in ("bf16", "int8", "int4"))
PAIRS = [(a, b) for a in CLASSES.values() for b in CLASSES.values() if a is b or a.page_bytes > b.page_bytes]
SLAB_UNITS = 6 * BF16.page_units
NUM_SLABS = 16  # room for more pages than one call copies


def place(slab: int, slot: int, page_class) -> int:
    """First unit of a page of a slab."""
    return slab * SLAB_UNITS + slot * page_class.page_units


def slots(page_class) -> range:
    return range(SLAB_UNITS // page_class.page_units)


@functools.cache
def program(source, target):
    """The conversion of one page."""
    formats = get_format(source.kv_format), get_format(target.kv_format)
    return jax.jit(functools.partial(requantize, WriteSpec(GEOMETRY, formats, "xla"), *formats))


@functools.cache
def slabs_of_pages() -> tuple[np.ndarray, dict[int, object]]:
    """An arena in which slab 1 is full of bf16 pages, slab 2 of int8, slab 3 of int4, and so on, with noise between;
    and the class of each page by first unit."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 2**16, (NUM_SLABS * SLAB_UNITS, *GEOMETRY.unit_shape), np.uint16)
    arena, pages = jnp.array(noise), {}
    for slab in range(1, NUM_SLABS):
        page_class = (BF16, INT8, INT4)[(slab - 1) % 3]
        units = np.array([place(slab, slot, page_class) for slot in slots(page_class)], np.int32)
        shape = (GEOMETRY.num_layers, GEOMETRY.kv_heads, len(units), GEOMETRY.page_size, GEOMETRY.head_dim)
        k, v = (jnp.array(rng.standard_normal(shape, np.float32)) for _ in "kv")
        spec = WriteSpec(GEOMETRY, (get_format(page_class.kv_format),), "xla")
        arena = write_pages(spec, arena, spec.encode_pages(k, v), jnp.array(units), jnp.zeros(len(units), jnp.int32))
        pages |= dict.fromkeys(units.tolist(), page_class)
    return np.array(arena), pages


@pytest.fixture(scope="module")
def operations() -> PageOperations:
    warm = PageOperations(Arena(GEOMETRY, NUM_SLABS * SLAB_UNITS), {(MODEL, 0): GEOMETRY}, SLAB_UNITS)
    before, _ = slabs_of_pages()
    warm.arena.units = jnp.array(before)
    assert warm.warm_up(PAIRS, transfers=True) == warm.num_compilations > 0
    np.testing.assert_array_equal(warm.arena.units, before)
    return warm


def apply(operations, arena: np.ndarray, stream) -> np.ndarray:
    """The arena after a stream of operations, none of which may compile anything."""
    compiled = operations.num_compilations
    operations.arena.units = jnp.array(arena)
    operations.apply(stream)
    assert operations.num_compilations == compiled
    return np.array(operations.arena.units)


def one_by_one(arena: np.ndarray, stream) -> np.ndarray:
    """What the operations mean; `words` of saved pages must agree with what it reads."""
    arena = arena.copy()
    for operation in stream:
        if isinstance(operation, Copy):
            source, target = operation.source_class, operation.target_class
            if source is not target:
                ends = (np.array([unit], np.int32) for unit in (operation.source, operation.target))
                arena = np.array(program(source, target)(jnp.array(arena), *ends, np.int32(1)))
            else:
                page = arena[operation.source : operation.source + source.page_units].copy()
                arena[operation.target : operation.target + target.page_units] = page
            continue
        pages = operation.pages
        for page_class, units, words in zip(pages.classes, operation.units, pages.words, strict=True):
            for unit, kept in zip(units, words, strict=True):
                own = slice(unit, unit + page_class.page_units)
                if isinstance(operation, Load):
                    arena[own] = kept
                else:
                    np.testing.assert_array_equal(arena[own], kept)
    return arena


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: f"{pair[0].kv_format}-{pair[1].kv_format}")
@pytest.mark.parametrize("count", [1, 5])
def test_pages_are_copied_or_encoded_anew_each_as_if_alone_and_nothing_else_changes(operations, pair, count):
    source, target = pair
    arena, pages = slabs_of_pages()
    sources = [unit for unit, page_class in pages.items() if page_class is source][:count]
    stream = [Copy(unit, place(15, i, target), source, target) for i, unit in enumerate(sources)]
    after = apply(operations, arena, stream)
    np.testing.assert_array_equal(after, one_by_one(arena, stream))
    changed = {unit // SLAB_UNITS for unit in np.flatnonzero((after != arena).any(axis=1))}
    assert changed == {15}


def test_more_copies_than_one_call_takes(operations):
    arena, pages = slabs_of_pages()
    sources = [unit for unit, page_class in pages.items() if page_class is INT4 and unit < 9 * SLAB_UNITS]
    targets = [place(slab, slot, INT4) for slab in range(9, NUM_SLABS) for slot in slots(INT4)]
    stream = [Copy(sources[i % len(sources)], unit, INT4, INT4) for i, unit in enumerate(targets)]
    assert len(stream) > COPIES
    np.testing.assert_array_equal(apply(operations, arena, stream), one_by_one(arena, stream))


def test_what_was_saved_is_loaded_bit_for_bit_elsewhere(operations):
    arena, pages = slabs_of_pages()
    classes, counts = [INT8, BF16], [TRANSFERRED_PAGES + 3, 2]
    units = [[unit for unit, c in pages.items() if c is kept][:n] for kept, n in zip(classes, counts, strict=True)]
    elsewhere = [[place(13 + i // 8, i % 8, INT8) for i in range(counts[0])], [place(12, 3, BF16), place(12, 1, BF16)]]
    assert not {u for run in units for u in run} & {u for run in elsewhere for u in run}
    host = HostPages(classes, counts)
    spoil = [Copy(units[1][1], unit, BF16, BF16) for unit in units[1][:1]]
    stream = [Save(host, units), *spoil, Load(host, elsewhere)]
    after = apply(operations, arena, stream)
    np.testing.assert_array_equal(after, one_by_one(arena, stream))
    for page_class, before, behind in zip(classes, units, elsewhere, strict=True):
        for old, new in zip(before, behind, strict=True):
            length = page_class.page_units
            np.testing.assert_array_equal(after[new : new + length], arena[old : old + length])
    assert operations.bytes_per_s > 0


def test_a_place_that_is_filled_twice_holds_what_came_last(operations):
    arena, _ = slabs_of_pages()
    target = place(5, 0, INT8)
    stream = [Copy(place(slab, slot, BF16), target, BF16, INT8) for slab, slot in ((1, 0), (1, 1), (4, 2))]
    np.testing.assert_array_equal(apply(operations, arena, stream), one_by_one(arena, stream))


@pytest.mark.parametrize("seed", range(4))
def test_chains_over_slabs_that_are_used_again_and_again_equal_doing_them_one_by_one(operations, seed):
    """Pages are read after they were written, written after they were read, written twice, and slabs change classes."""
    rng = np.random.default_rng(seed)
    arena, pages = slabs_of_pages()
    live = {unit: page_class for unit, page_class in pages.items() if unit < 5 * SLAB_UNITS}
    bound = {slab: (BF16, INT8, INT4)[(slab - 1) % 3] for slab in range(1, 5)}
    stream, saved = [], None
    for _ in range(80):
        source = int(rng.choice(list(live)))
        source_class, slab = live[source], int(rng.integers(1, 5))
        narrower = [c for c in CLASSES.values() if (source_class, c) in PAIRS]
        if slab != source // SLAB_UNITS and rng.random() < 0.3:  # the slab is given up, and bound anew
            bound[slab] = narrower[rng.integers(len(narrower))]
            live = {unit: c for unit, c in live.items() if unit // SLAB_UNITS != slab}
        target_class = bound[slab]
        target = place(slab, int(rng.choice(slots(target_class))), target_class)
        if target_class in narrower and target != source:
            if rng.random() < 0.1 and saved is None:
                saved = HostPages([source_class], [1])
                stream.append(Save(saved, [[source]]))
            stream.append(Copy(source, target, source_class, target_class))
            live[target] = target_class
        if saved is not None and target_class is saved.classes[0] and rng.random() < 0.5:
            stream.append(Load(saved, [[target]]))
            live[target], saved = target_class, None
    assert len(stream) > 30
    after = apply(operations, arena, stream)
    np.testing.assert_array_equal(after, one_by_one(arena, stream))
