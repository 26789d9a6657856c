"""What an engine tells of itself."""

from dataclasses import dataclass

from fineserve_jax.kv.stats import ClassStats
from fineserve_jax.kv.usage import FormatUsage, KVCounts


@dataclass(frozen=True, slots=True)
class ModelStats:
    """How one model of an engine stands.

    Attributes:
        weights: precision of its weights.
        kv: per KV format, what its pages take of the arena.
        prediction_error: typical relative error of its predicted step times; None before there is one.
    """

    weights: str
    kv: dict[str, ClassStats]
    prediction_error: float | None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How the engine stands and what it did so far.

    Attributes:
        kv: per KV format, over all models, bytes needed, reserved and free.
        kv_bytes: the arena's size.
        kv_counts: pages shared, narrowed, moved and so on since the start.
        num_waiting, num_running: requests without and with memory.
        num_prompt_tokens, num_output_tokens: computed and sampled tokens since the start.
        output_tokens_per_s: sampled tokens over the time spent in steps, compilation included.
        num_steps, num_preemptions, num_compilations: since the start.
        prediction_error: typical relative error of predicted step times, the largest of the models'; None before there
            is one.
        models: each model's part, by name.
    """

    kv: dict[str, FormatUsage]
    kv_bytes: int
    kv_counts: KVCounts
    num_waiting: int
    num_running: int
    num_prompt_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    num_steps: int
    num_preemptions: int
    num_compilations: int
    prediction_error: float | None
    models: dict[str, ModelStats]
