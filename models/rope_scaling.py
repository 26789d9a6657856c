"""How rotary frequencies are stretched beyond the context that a model was trained on."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from fineserve_jax.errors import ModelLoadError

RopeKind = Literal["linear", "llama3", "yarn", "longrope", "factors"]
ROPE_KINDS: tuple[str, ...] = ("linear", "llama3", "yarn", "longrope", "factors")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    kind: `linear` divides every frequency by `factor`; `llama3` divides the slow ones and blends between
        (Llama 3.1, section "long context"); `yarn` is arXiv 2309.00071; `factors` divides frequency i by
        `factors[i]`, which is how GGUF files spell out `llama3`; `longrope` is arXiv 2402.13753: sequences of up to
        `original_max_position` tokens divide by `factors`, longer ones by `long_factors`.
    factor: the stretch, >= 1.
    original_max_position: context length in tokens before stretching (llama3, yarn, longrope).
    low_freq_factor, high_freq_factor: llama3's band, in turns per original context.
    beta_fast, beta_slow: yarn's band, in turns per original context.
    attention_factor: yarn's and longrope's multiplier of cos and sin; None derives yarn's, 0.1 ln(factor) + 1, or
        longrope's, sqrt(1 + ln(factor) / ln(original_max_position)).
    truncate: whether yarn rounds its band to whole dimensions.
    factors, long_factors: one divisor per frequency, half as many as there are rotated values of a head.
    """

    kind: RopeKind
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ModelLoadError(f"RoPE scaling {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        if self.kind in ("llama3", "yarn", "longrope") and self.original_max_position <= 0:
            raise ModelLoadError(
                f"RoPE scaling {self.kind!r} needs the original context length, got "
                f"{self.original_max_position}; set original_max_position_embeddings in config.json"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        numbers = {"factor": self.factor, "attention_factor": self.attention_factor}
        for name in ("factors", "long_factors"):
            numbers |= {f"{name}[{index}]": factor for index, factor in enumerate(getattr(self, name))}
        for name, value in numbers.items():
            if value is not None and not 0.0 < value < math.inf:
                raise ModelLoadError(f"RoPE scaling {self.kind!r}: {name} is {value}, must be a positive number")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ModelLoadError(
                f"RoPE scaling {self.kind!r}: low_freq_factor {self.low_freq_factor} must be positive and less than "
                f"high_freq_factor {self.high_freq_factor}"
            )
        if not 0.0 < self.beta_slow < self.beta_fast < math.inf:
            raise ModelLoadError(
                f"RoPE scaling {self.kind!r}: beta_slow {self.beta_slow} must be positive and less than "
                f"beta_fast {self.beta_fast}"
            )
