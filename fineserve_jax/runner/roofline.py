"""Where step-time predictions start from: published peaks of known devices, modest ones for a CPU."""

import jax

from fineserve_jax.scheduler.costs import DeviceRoofline

# Dense bf16 operations/s and bytes/s from the makers' data sheets; keys are parts of `device_kind`, lower case.
PEAKS = {
    "h100": DeviceRoofline(989e12, 3.35e12),
    "h200": DeviceRoofline(989e12, 4.8e12),
    "a100": DeviceRoofline(312e12, 2.04e12),
    "l4": DeviceRoofline(121e12, 0.3e12),
    "v5 lite": DeviceRoofline(197e12, 0.82e12),
    "v6 lite": DeviceRoofline(918e12, 1.64e12),
}
UNKNOWN_ACCELERATOR = DeviceRoofline(100e12, 1e12)
# Two or so cores: what XLA reaches in matrix products there. Measured step times soon replace it.
CPU = DeviceRoofline(200e9, 20e9)


def device_roofline(device: jax.Device) -> DeviceRoofline:
    """The peaks of this device, or of a typical one of its platform if it is not known."""
    if device.platform == "cpu":
        return CPU
    kind = device.device_kind.lower()
    return next((peaks for name, peaks in PEAKS.items() if name in kind), UNKNOWN_ACCELERATOR)
