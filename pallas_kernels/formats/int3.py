"""int3: int4 with codes of 3 bits.

A third of its size are ranges of keys, 16 bits for each channel of a page of 16 tokens; pages of 32 tokens halve that.
"""

from fineserve_jax.pallas_kernels.format_sizes import Int3KeySizes, Int3ValueSizes
from fineserve_jax.pallas_kernels.formats.int4 import ChannelRanges, TokenRanges


class Int3KeyCodec(Int3KeySizes, ChannelRanges):
    """Keys of int3."""


class Int3ValueCodec(Int3ValueSizes, TokenRanges):
    """Values of int3."""
