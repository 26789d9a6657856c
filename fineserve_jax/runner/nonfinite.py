"""Which requests of a step got numbers that are not finite, and from which stage on."""

from collections.abc import Sequence

import numpy as np

from fineserve_jax.request.request import Request, SchedulerOutput
from fineserve_jax.runner.inputs import chunk_slots
from fineserve_jax.runner.shapes import StepSpec


def find_nonfinite(
    spec: StepSpec,
    output: SchedulerOutput,
    finite_logits: dict[Request, bool],
    finite_slots: np.ndarray,
    finite_stages: Sequence[np.ndarray],
) -> dict[Request, str | None]:
    """The requests for which a step computed NaN or infinity, be it for one token of a chunk.

    Args:
        finite_logits: of the requests that are sampled or scored.
        finite_slots: bool[N], `step.finite_slots` of the last layer.
        finite_stages: the same of the embedding and of each layer; empty if nobody looked.

    Returns:
        each with the stage whose output is the first that is not finite; None if nobody looked.
    """
    if finite_slots.all() and all(finite_logits.values()):
        return {}
    found = {}
    for scheduled, slots in zip(output.chunks, chunk_slots(spec, output), strict=True):
        if not (finite_slots[slots].all() and finite_logits.get(scheduled.request, True)):
            found[scheduled.request] = _first_stage([stage[slots] for stage in finite_stages])
    return found


def _first_stage(finite_stages: Sequence[np.ndarray]) -> str | None:
    if not finite_stages:
        return None
    first = next((i for i, finite in enumerate(finite_stages) if not finite.all()), None)
    if first is None:
        return "the head"
    return f"layer {first - 1}" if first else "the embedding"
