"""Carries out on the device what the host's bookkeeping has queued: pages copied, converted, saved and loaded.

Adjacent copies between the same two classes go into one program, as long as none touches what another of them wrote:
the programs promise no order within a call.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.operations import Copy, Load, PageOperation, Save
from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.pallas_kernels.operations import requantize
from fineserve_jax.pallas_kernels.specs import WriteSpec
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.mesh import PAGES_OF_HOST, SAME, SHARDED, over_mesh
from fineserve_jax.runner.programs import compile_counted

COPIES = 64  # of a call, the rest being padding
TRANSFERRED_PAGES = 16  # of a call that saves or loads
PAGES_AT_A_TIME = 4


class PageOperations:
    """Programs that work on whole pages of an arena.

    Args:
        arena: what they change.
        geometries: of the pages of each model and layer group; of several devices those of each.
        slab_units: units of a slab; pages in different slabs do not overlap.
        implementation: of the conversions.

    Attributes:
        num_compilations: programs compiled, or loaded from JAX's compilation cache.
        bytes_per_s: measured rate of saving and loading, of each device; None before the first.
    """

    def __init__(
        self,
        arena: Arena,
        geometries: Mapping[tuple[str, int], PageGeometry],
        slab_units: int,
        implementation: Implementation = "xla",
    ) -> None:
        self.arena, self.geometries = arena, dict(geometries)
        self.slab_units, self.implementation = slab_units, implementation
        self.num_compilations = 0
        self.bytes_per_s: float | None = None
        self._programs: dict[Any, Callable[..., Any]] = {}

    def apply(self, operations: Sequence[PageOperation]) -> None:
        """Carries the operations out, in their order."""
        for batch in _batches(operations, self.slab_units):
            first = batch[0]
            if isinstance(first, Copy):
                copies = np.zeros((2, COPIES), np.int32)
                copies[:, : len(batch)] = [[c.source for c in batch], [c.target for c in batch]]
                program = self._copy(first.source_class, first.target_class)
                self.arena.units = program(self.arena.units, *copies, np.int32(len(batch)))
            elif isinstance(first, Save):
                self._timed(self._save, first)
            else:
                self._timed(self._load, first)

    def forget(self, model: str) -> None:
        """Forget a model, of which no operation is queued: another one of its name may have other pages."""
        self.geometries = {key: geometry for key, geometry in self.geometries.items() if key[0] != model}
        for key in [key for key in self._programs if key[0] == "convert" and key[1].model == model]:
            del self._programs[key]

    def warm_up(self, pairs: Iterable[tuple[PageClass, PageClass]], transfers: bool) -> int:
        """Compiles the copies between these classes, and with `transfers` saving and loading their pages.

        Returns:
            how many programs that took.
        """
        before, pairs = self.num_compilations, list(pairs)
        nowhere = np.full(COPIES, NOWHERE, np.int32)
        for pair in pairs:
            self.arena.units = self._copy(*pair)(self.arena.units, np.zeros(COPIES, np.int32), nowhere, np.int32(0))
        for page_class in dict.fromkeys(page_class for pair in pairs for page_class in pair) if transfers else ():
            words = self._gather(page_class)(self.arena.units, np.zeros(TRANSFERRED_PAGES, np.int32))
            scatter = self._scatter(page_class)
            self.arena.units = scatter(self.arena.units, np.asarray(words), nowhere[:TRANSFERRED_PAGES])
        return self.num_compilations - before

    # -- between device and host ---------------------------------------------------------------------------------

    def _save(self, save: Save) -> None:
        for page_class, units in zip(save.pages.classes, save.units, strict=True):
            gather = self._gather(page_class)
            parts = [np.asarray(gather(self.arena.units, part))[:count] for part, count in _transfers(units, 0)]
            save.pages.words.append(np.concatenate(parts))

    def _load(self, load: Load) -> None:
        for page_class, units, words in zip(load.pages.classes, load.units, load.pages.words, strict=True):
            first = 0
            for part, count in _transfers(units, NOWHERE):
                padded = np.zeros((TRANSFERRED_PAGES, *words.shape[1:]), words.dtype)
                padded[:count] = words[first : first + count]
                self.arena.units = self._scatter(page_class)(self.arena.units, padded, part)
                first += count
        jax.block_until_ready(self.arena.units)

    def _timed(self, transfer: Callable[[Any], None], what: Save | Load) -> None:
        compiled, start = self.num_compilations, time.perf_counter()
        transfer(what)
        seconds = time.perf_counter() - start
        if compiled == self.num_compilations:
            rate = sum(words.nbytes for words in what.pages.words) / self.arena.group.size / seconds
            self.bytes_per_s = rate if self.bytes_per_s is None else 0.8 * self.bytes_per_s + 0.2 * rate

    # -- programs ------------------------------------------------------------------------------------------------

    def _copy(self, source: PageClass, target: PageClass) -> Callable[..., jax.Array]:
        if source is target or source.kv_format == target.kv_format:
            units = source.page_units
            return self._program(("copy", units), functools.partial(copy_pages, page_units=units))
        formats = get_format(source.kv_format), get_format(target.kv_format)
        spec = WriteSpec(self.geometries[source.model, source.group], formats, self.implementation)
        return self._program(("convert", source, target), functools.partial(requantize, spec, *formats))

    def _gather(self, page_class: PageClass) -> Callable[..., jax.Array]:
        units = page_class.page_units
        gather = functools.partial(_gather_pages, page_units=units)
        return self._program(("gather", units), gather, [SHARDED, SAME], PAGES_OF_HOST)

    def _scatter(self, page_class: PageClass) -> Callable[..., jax.Array]:
        arguments = [SHARDED, PAGES_OF_HOST, SAME]
        return self._program(("scatter", page_class.page_units), _scatter_pages, arguments)

    def _program(
        self,
        key: Any,
        function: Callable[..., Any],
        arguments: Sequence[PartitionSpec] = (SHARDED, SAME, SAME, SAME),
        result: PartitionSpec = SHARDED,
    ) -> Callable[..., Any]:
        """`arguments`, `result`: how they lie on several devices; what gives the arena takes it donated."""
        if key not in self._programs:
            own = over_mesh(self.arena.group.mesh, function, arguments, result)
            self._programs[key] = compile_counted(own, self._count, (0,) if result == SHARDED else ())
        return self._programs[key]

    def _count(self) -> None:
        self.num_compilations += 1


def copy_pages(
    arena: jax.Array, sources: jax.Array, targets: jax.Array, count: jax.Array, page_units: int
) -> jax.Array:
    """Copies pages as they are.

    Args:
        arena: u16[num_units, *unit_shape]; donate it.
        sources, targets: i32[N], first units. No target overlaps a source or another target.
        count: i32[], how many of them count.
        page_units: units of a page.
    """
    padding = [(0, -len(sources) % PAGES_AT_A_TIME)]
    sources, targets = jnp.pad(sources, padding), jnp.pad(targets, padding)

    def copy(step: jax.Array, arena: jax.Array) -> jax.Array:
        start = step * PAGES_AT_A_TIME
        source, target = (lax.dynamic_slice(pages, (start,), (PAGES_AT_A_TIME,)) for pages in (sources, targets))
        target = jnp.where(start + jnp.arange(PAGES_AT_A_TIME) < count, target, NOWHERE)
        return _scatter_pages(arena, _gather_pages(arena, source, page_units), target)

    return lax.fori_loop(0, -(-count // PAGES_AT_A_TIME), copy, arena)


def _gather_pages(arena: jax.Array, pages: jax.Array, page_units: int) -> jax.Array:
    """Whole pages, u16[N, page_units, *unit_shape]."""
    return arena.at[pages[:, None] + jnp.arange(page_units, dtype=jnp.int32)].get(mode="promise_in_bounds")


def _scatter_pages(arena: jax.Array, words: jax.Array, pages: jax.Array) -> jax.Array:
    """The arena with whole pages written; those directed to NOWHERE are not."""
    units = pages[:, None] + jnp.arange(words.shape[1], dtype=jnp.int32)
    return arena.at[units].set(words, mode="drop")


def _transfers(units: Sequence[int], padding: int) -> Iterator[tuple[np.ndarray, int]]:
    """First units i32[TRANSFERRED_PAGES] at a time, and how many of them count."""
    for first in range(0, len(units), TRANSFERRED_PAGES):
        part = units[first : first + TRANSFERRED_PAGES]
        padded = np.full(TRANSFERRED_PAGES, padding, np.int32)
        padded[: len(part)] = part
        yield padded, len(part)


def _batches(operations: Sequence[PageOperation], slab_units: int) -> Iterator[list[Any]]:
    """The operations in order: copies that can go into one call together, others one by one. Of a call's copies none
    writes what another of them reads or writes: between classes slabs are told apart, within a class pages."""
    batch: list[Copy] = []
    read: set[int] = set()
    written: dict[int, PageClass] = {}
    targets: set[int] = set()
    for operation in operations:
        if not isinstance(operation, Copy):
            if batch:
                yield batch
            batch, read, written, targets = [], set(), {}, set()
            yield [operation]
            continue
        source, target = operation.source // slab_units, operation.target // slab_units
        clashes = (
            source in written
            or target in read
            or operation.target in targets
            or written.get(target, operation.target_class) != operation.target_class
        )
        classes = (operation.source_class, operation.target_class)
        if batch and (clashes or len(batch) == COPIES or classes != (batch[0].source_class, batch[0].target_class)):
            yield batch
            batch, read, written, targets = [], set(), {}, set()
        batch.append(operation)
        read.add(source)
        targets.add(operation.target)
        written[target] = operation.target_class
    if batch:
        yield batch
