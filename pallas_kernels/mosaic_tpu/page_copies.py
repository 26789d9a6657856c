"""The copies of pages from the arena to vector memory, a few pages to a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.mosaic_tpu.launch_plan import BUFFERS, Launch, Memory, Ref, TileTable
from fineserve_jax.pallas_kernels.pallas_api import ds, tpu_async_copy, when


class TileCopies:
    """The tiles' steps, and the copies of their pages."""

    def __init__(self, launch: Launch, table: TileTable, pages: Ref, layer: jax.Array, arena: Ref, memory: Memory):
        self.launch, self.table, self.memory = launch, table, memory
        self._pages, self._layer, self._arena = pages, layer, arena

    def num_steps(self, tile: jax.Array) -> jax.Array:
        return lax.div(self.table.num_pages[tile] + (self.launch.pages - 1), self.launch.pages)

    def buffer(self, tile: jax.Array, step: jax.Array) -> jax.Array:
        """Where a step's pages go. A tile leaves one buffer to the first step of the next."""
        return lax.rem(2 * tile + lax.rem(step, 2), BUFFERS)

    def start_tile(self, tile: jax.Array) -> None:
        """Starts to copy the pages of a tile's first step, if it has any."""
        for number in range(len(self.launch.formats)):

            @when(self.table.format_ids[tile] == number)
            def _(number: int = number) -> None:
                self.start(number, tile, jnp.int32(0))

    def start(self, number: int, tile: jax.Array, step: jax.Array) -> None:
        """Starts to copy a step's pages, of format `number`; none behind the last step."""
        self._for_pages(number, tile, step, lambda copy: copy.start())

    def wait(self, number: int, tile: jax.Array, step: jax.Array) -> None:
        self._for_pages(number, tile, step, lambda copy: copy.wait())

    def _for_pages(self, number: int, tile: jax.Array, step: jax.Array, act: Callable[[Any], None]) -> None:
        layout = self.launch.formats[number]
        units = layout.kv_format.units_per_layer(layout.geometry)
        done, buffer = step * self.launch.pages, self.buffer(tile, step)
        count = jnp.minimum(self.launch.pages, self.table.num_pages[tile] - done)

        def body(place: jax.Array, nothing: None) -> None:
            unit = self._pages[self.table.first_pages[tile] + done + place] + self._layer * units
            target = self.memory.pages.at[buffer, place, ds(0, units)]
            act(tpu_async_copy(self._arena.at[ds(unit, units)], target, self.memory.semaphores.at[buffer]))

        lax.fori_loop(0, count, body, None)
