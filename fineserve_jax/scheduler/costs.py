"""What a step costs in operations and bytes, counted from its chunks; no seconds here (see `profile`)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fineserve_jax.request.request import ScheduledChunk


@dataclass(frozen=True, slots=True)
class FormatCost:
    """A KV format of a model.

    Attributes:
        bits: average bits of a cached value, scales counted; orders formats in the `fineserve` policy.
        bytes_per_token: bytes that one cached token takes, K and V of all layers, scales counted.
    """

    bits: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class ModelCost:
    """A model, as the scheduler sees it.

    Attributes:
        flops_per_token: operations of the layers' matrix products for one token, twice their active parameters. The
            output head's are left out: a prompt goes through the head once, and while decoding its weights are read
            for so few rows that reading, which `weight_bytes` counts, is what takes the time.
        flops_per_pair: operations of attention for one pair of query and key token.
        weight_bytes: bytes of weights that a step reads.
        formats: cost of each KV format that requests of this model may name.
    """

    flops_per_token: float
    flops_per_pair: float
    weight_bytes: float
    formats: Mapping[str, FormatCost]


def dense_layer_parameters(
    hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, intermediate_size: int
) -> int:
    """Parameters of the matrices of a layer whose MLP is gated: q, k, v and o, and gate, up and down."""
    return hidden_size * (2 * head_dim * (num_heads + num_kv_heads) + 3 * intermediate_size)


def pair_flops(num_layers: int, num_heads: int, head_dim: int) -> int:
    """Operations of attention for a query and a key token: a multiply and an add for the logit, and for the value."""
    return 4 * num_layers * num_heads * head_dim


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step does.

    Attributes:
        tokens: tokens that go through the model.
        chunk_pairs: pairs of a prefill token and a token it attends to.
        kv_bytes: bytes of cached K and V read.
        kv_tokens: tokens that these bytes hold, which take their time where they are widened slowly.
    """

    tokens: int
    chunk_pairs: int
    kv_bytes: float
    kv_tokens: int = 0

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(
            self.tokens + other.tokens,
            self.chunk_pairs + other.chunk_pairs,
            self.kv_bytes + other.kv_bytes,
            self.kv_tokens + other.kv_tokens,
        )


def step_cost(chunks: Iterable[ScheduledChunk], formats: Mapping[str, FormatCost]) -> StepCost:
    """Cost of computing `chunks` together. The attention of a decode is counted by what it reads only, since reading is
    what takes its time."""
    tokens, pairs, kv_bytes, kv_tokens = 0, 0, 0.0, 0
    for scheduled in chunks:
        start, count = scheduled.start, scheduled.count
        rows = 1 + len(scheduled.drafts)  # each reads all that is cached
        tokens += scheduled.num_slots + rows - 1
        kv_tokens += rows * start
        kv_bytes += rows * start * formats[scheduled.request.kv_precision].bytes_per_token
        if count > 1:
            pairs += count * start + count * (count + 1) // 2
        for branch in scheduled.branches:
            own = len(branch) - 1
            pairs += own * (start + count) + own * (own + 1) // 2
    return StepCost(tokens, pairs, kv_bytes, kv_tokens)
