"""Steps that were called and may not be computed yet: what the host has to keep of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.runner.inputs import StepInputs
from fineserve_jax.runner.layer_attention import LayerWords
from fineserve_jax.runner.pooling import PoolingPlan
from fineserve_jax.runner.sampler import Sampled
from fineserve_jax.runner.scoring import ScoringPlan
from fineserve_jax.runner.shapes import StepSpec
from fineserve_jax.runner.step import Stream


@dataclass(frozen=True, slots=True)
class BegunStep:
    """A step whose embedding and layers were called.

    Attributes:
        spec, output: what it is.
        sampling: the chunks behind which a token is sampled, as of when it was called.
        rows: the request of each sampled row; one with drafts has several.
        inputs: on the device.
        stream, words, checks: what the layers give: their output, encoded keys and values, and, with `check_finite`,
            of which slots each output is finite.
    """

    spec: StepSpec
    output: SchedulerOutput
    sampling: tuple[ScheduledChunk, ...]
    rows: list[Request]
    inputs: StepInputs
    stream: Stream
    words: list[LayerWords]
    checks: list[jax.Array]

    @property
    def drafts_ahead(self) -> list[tuple[int, ...]]:
        """Of each sampled row, the drafts that it follows."""
        return [chunk.drafts[:count] for chunk in self.sampling for count in range(len(chunk.drafts) + 1)]


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step of which all was called.

    Attributes:
        outputs: the sampled tokens, and of which slots the last layer's output is finite.
        plan, tiles, kept: what is scored, and what that gives.
        stuck: the requests that may sample nothing, each with the reason.
        pooling, sums: what is pooled, and what that gives; None: nothing is.
    """

    step: BegunStep
    outputs: tuple[Sampled, jax.Array]
    plan: ScoringPlan
    tiles: list[Any]
    kept: list[jax.Array]
    stuck: dict[Request, str]
    pooling: PoolingPlan | None
    sums: jax.Array | None

    @property
    def output(self) -> SchedulerOutput:
        """What it computes."""
        return self.step.output

    def rows_of(self, decodes: Sequence[ScheduledChunk], num_rows: int) -> np.ndarray:
        """i32[num_rows], which of the sampled rows gives the token of each decode; -1 behind them."""
        row_of = {request: row for row, request in enumerate(self.step.rows)}
        found = np.full(num_rows, -1, np.int32)
        found[: len(decodes)] = [row_of[chunk.request] for chunk in decodes]
        return found
