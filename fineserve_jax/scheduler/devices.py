"""Accelerators by their published peaks: where step-time predictions start, and what the simulator can stand in for.

Sources, dense figures (without sparsity):
    H100 SXM5 80 GB   NVIDIA H100 datasheet: 989 TFLOP/s bf16, 1,979 TFLOP/s FP8, 3.35 TB/s
    H200 SXM 141 GB   NVIDIA H200 datasheet: 989 TFLOP/s bf16, 1,979 TFLOP/s FP8, 4.8 TB/s
    A100 SXM4 80 GB   NVIDIA A100 datasheet: 312 TFLOP/s bf16, 624 TOP/s INT8, 2.039 TB/s
    L4 24 GB          NVIDIA L4 datasheet, halved from sparse: 121 TFLOP/s bf16, 242 TFLOP/s FP8, 300 GB/s
    TPU v5e           Google Cloud documentation: 197 TFLOP/s bf16, 393 TOP/s INT8, 16 GB, 819 GB/s
    TPU v6e           Google Cloud documentation: 918 TFLOP/s bf16, 1,836 TOP/s INT8, 32 GB, 1,640 GB/s
"""

import math
import re
from dataclasses import dataclass

from fineserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class DeviceRoofline:
    """A device's peaks: `flops` operations/s, `bandwidth` bytes/s, `overhead_s` seconds a step takes besides.

    Raises:
        ConfigError: a rate that is not positive, or a negative overhead.
    """

    flops: float
    bandwidth: float
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ConfigError(f"{name}={value!r} of the device roofline; give a positive rate per second")
        if not (self.overhead_s >= 0 and math.isfinite(self.overhead_s)):
            raise ConfigError(f"overhead_s={self.overhead_s!r} of the device roofline; give 0 or more seconds")


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """The data sheet of one chip.

    Attributes:
        name: as users write it.
        kinds: words by which JAX's `device_kind`, in lower case, tells the chip.
        flops: peak dense 16-bit operations/s.
        narrow_flops: peak dense 8-bit operations/s.
        bandwidth: peak bytes/s of its memory.
        memory_bytes: size of its memory.
        link_bandwidth: bytes/s to the other chips of a tensor-parallel group, one direction.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    narrow_flops: float
    bandwidth: float
    memory_bytes: float
    link_bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        DeviceSpec("h100", ("h100",), 989e12, 1979e12, 3.35e12, 80e9, 450e9),
        DeviceSpec("h200", ("h200", "gh200"), 989e12, 1979e12, 4.8e12, 141e9, 450e9),
        DeviceSpec("a100", ("a100",), 312e12, 624e12, 2.039e12, 80e9, 300e9),
        DeviceSpec("l4", ("l4",), 121e12, 242e12, 0.3e12, 24e9, 32e9),
        DeviceSpec("v5e", ("v5e", "v5 lite"), 197e12, 393e12, 0.819e12, 16e9, 200e9),
        DeviceSpec("v6e", ("v6e", "v6 lite"), 918e12, 1836e12, 1.64e12, 32e9, 448e9),
    )
}
UNKNOWN_ACCELERATOR = DeviceRoofline(100e12, 1e12)
CPU = DeviceRoofline(200e9, 20e9)
"""What XLA reaches in matrix products on about two cores. Measured step times soon replace it."""


def get_device(name: str) -> DeviceSpec:
    """The device of that name; raises ConfigError if there is none."""
    try:
        return DEVICES[name]
    except KeyError:
        raise ConfigError(f"device={name!r} is not known; choose one of {', '.join(DEVICES)}") from None


def device_roofline(platform: str, device_kind: str) -> DeviceRoofline:
    """The peaks of the device that JAX calls so, in 16-bit products; those of a typical one if it is not known."""
    if platform == "cpu":
        return CPU
    for device in DEVICES.values():
        if any(re.search(rf"\b{kind}\b", device_kind.lower()) for kind in device.kinds):
            return DeviceRoofline(device.flops, device.bandwidth)
    return UNKNOWN_ACCELERATOR
