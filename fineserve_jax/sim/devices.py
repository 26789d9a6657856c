"""Accelerators nobody needs to own: their published peaks, and what of them a step can count on.

Sources, dense figures (without sparsity):
    H100 SXM5 80 GB   NVIDIA H100 datasheet: 989 TFLOP/s bf16, 1,979 TFLOP/s FP8, 3.35 TB/s
    A100 SXM4 80 GB   NVIDIA A100 datasheet: 312 TFLOP/s bf16, 624 TOP/s INT8, 2.039 TB/s
    L4 24 GB          NVIDIA L4 datasheet, halved from sparse: 121 TFLOP/s bf16, 242 TFLOP/s FP8, 300 GB/s
    TPU v5e           Google Cloud documentation: 197 TFLOP/s bf16, 393 TOP/s INT8, 16 GB, 819 GB/s
    TPU v6e           Google Cloud documentation: 918 TFLOP/s bf16, 1,836 TOP/s INT8, 32 GB, 1,640 GB/s
"""

from dataclasses import dataclass

from fineserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Device:
    """One chip.

    Attributes:
        name: as users write it.
        flops: peak dense 16-bit operations/s.
        narrow_flops: peak dense 8-bit operations/s.
        bandwidth: peak bytes/s of its memory.
        memory_bytes: size of its memory.
        link_bandwidth: bytes/s to the other chips of a tensor-parallel group, one direction.
    """

    name: str
    flops: float
    narrow_flops: float
    bandwidth: float
    memory_bytes: float
    link_bandwidth: float


DEVICES = {
    device.name: device
    for device in (
        Device("h100", 989e12, 1979e12, 3.35e12, 80e9, 450e9),
        Device("a100", 312e12, 624e12, 2.039e12, 80e9, 300e9),
        Device("l4", 121e12, 242e12, 0.3e12, 24e9, 32e9),
        Device("v5e", 197e12, 393e12, 0.819e12, 16e9, 200e9),
        Device("v6e", 918e12, 1836e12, 1.64e12, 32e9, 448e9),
    )
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What of a peak is reached. Assumptions, not measurements; `benchmarks/cost_model.py` shows how far they carry.

    Attributes:
        flops: share of the peak in 16-bit matrix products. Large products on an H100 run into its power limit
            at about two thirds of the data sheet's figure.
        narrow_flops: the same for 8-bit products, which also have to quantise activations.
        dequantise: the same for 4-bit weights that are widened to 16 bits first, of the 16-bit peak.
        bandwidth: share of the peak in reading weights and KV.
        step_overhead_s: seconds of a step that neither products nor reading take.
        layer_overhead_s: the same, a layer: launches in an engine that does not replay recorded graphs.
        reduce_s: seconds of one all-reduce of a tensor-parallel group besides its bytes.
    """

    flops: float = 0.65
    narrow_flops: float = 0.45
    dequantise: float = 0.35
    bandwidth: float = 0.85
    step_overhead_s: float = 1e-3
    layer_overhead_s: float = 0.0
    reduce_s: float = 15e-6


def get_device(name: str) -> Device:
    """The device of that name; raises ConfigError if there is none."""
    try:
        return DEVICES[name]
    except KeyError:
        raise ConfigError(f"device={name!r} is not known; choose one of {', '.join(DEVICES)}") from None
