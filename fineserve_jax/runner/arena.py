"""The device half of the KV cache: one array that the runners of all models read, and write in turn."""

import logging

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.runner.mesh import SHARDED, DeviceGroup, device_group, per_device_bytes

log = logging.getLogger(__name__)


class Arena:
    """All KV there is on the device, or on each of several.

    A program that writes it takes `units` donated, and whoever calls it puts the result back at once: the array that
    was there before is gone.

    Args:
        geometry: of any model's pages; all that share the arena have units of one length.
        num_units: how many units it has on a device, the null page's included.
        group: the devices; None: JAX's first.

    Attributes:
        units: u16[num_units, *unit_shape]; of several devices one behind the other.
    """

    def __init__(self, geometry: PageGeometry, num_units: int, group: DeviceGroup | None = None) -> None:
        self._geometry, self._num_units = geometry, num_units
        self.group = group or device_group(1)
        self.units: jax.Array = self._new()

    def _new(self) -> jax.Array:
        """An empty arena, see `pallas_kernels.arena.new_arena`."""
        shape = (self.group.size * self._num_units, *self._geometry.unit_shape)
        return jnp.zeros(shape, jnp.uint16, device=self.group.sharding(SHARDED))

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
        self.units = self._new()

    def release(self) -> None:
        """Gives the array's memory back, with all that is in it; `renew` takes it again."""
        self.units.delete()

    @property
    def nbytes(self) -> int:
        """Bytes on a device."""
        return per_device_bytes(self.units)
