"""The device half of the KV cache: one array that the runners of all models read, and write in turn."""

import logging

import jax

from fineserve_jax.pallas_kernels.arena import new_arena
from fineserve_jax.pallas_kernels.geometry import PageGeometry

log = logging.getLogger(__name__)


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
        self._geometry, self._num_units = geometry, num_units
        self.units: jax.Array = new_arena(geometry, num_units)
        (self._device,) = self.units.devices()

    @property
    def is_lost(self) -> bool:
        """Whether the array is gone: a program that took it was cut short before its result was put back, or failed."""
        if self.units.is_deleted():
            return True
        try:
            jax.block_until_ready(self.units)
        except Exception as error:  # whatever made the program fail that was to give it
            log.warning("the program that was to write the KV arena has failed: %s", error)
            return True
        return False

    def renew(self) -> None:
        """Makes the array anew, empty; what is left of the one before is freed first."""
        self.units.delete()
        self.units = new_arena(self._geometry, self._num_units)

    def release(self) -> None:
        """Gives the array's memory back, with all that is in it; `renew` takes it again."""
        self.units.delete()

    @property
    def device(self) -> jax.Device:
        """Where it is."""
        return self._device

    @property
    def nbytes(self) -> int:
        return self.units.nbytes
