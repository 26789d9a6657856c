"""The device half of the KV cache: one array that the runners of all models read, and write in turn."""

import jax

from fineserve_jax.pallas_kernels.arena import new_arena
from fineserve_jax.pallas_kernels.geometry import PageGeometry


class Arena:
    """All KV there is on the device.

    A program that writes it takes `units` donated, and whoever calls it puts the result back at once: the array that
    was there before is gone.

    Args:
        geometry: of any model's pages; all that share the arena have units of one length.
        num_units: how many units it has, the null page's included.

    Attributes:
        units: u16[num_units, *unit_shape].
    """

    def __init__(self, geometry: PageGeometry, num_units: int) -> None:
        self.units: jax.Array = new_arena(geometry, num_units)

    @property
    def nbytes(self) -> int:
        return self.units.nbytes
