"""What of a device's published peaks a step can count on."""

from dataclasses import dataclass


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
