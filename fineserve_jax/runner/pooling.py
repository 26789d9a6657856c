"""Pooling of hidden states: of each request the sum over the tokens that a step computes of it."""

from dataclasses import dataclass

import numpy as np

from fineserve_jax.request.request import Request, SchedulerOutput
from fineserve_jax.runner.inputs import chunk_slots
from fineserve_jax.runner.shapes import StepSpec


@dataclass(frozen=True, slots=True)
class PoolingPlan:
    """What of a step is pooled.

    Attributes:
        owners: i32[N], see `step.pool`.
        requests: of each sum, by its number, the request.
    """

    owners: np.ndarray
    requests: dict[int, Request]

    def collect(self, sums: np.ndarray) -> dict[Request, np.ndarray]:
        """f64[hidden] of each request. `sums`: what `step.pool` gave."""
        return {request: sums[number].astype(np.float64) for number, request in self.requests.items()}


def plan_pooling(spec: StepSpec, output: SchedulerOutput) -> PoolingPlan | None:
    """Which slots of a step are pooled; None: none are."""
    if all(scheduled.request.pooling is None for scheduled in output.chunks):
        return None
    nobody = spec.shape.rows + spec.chunk_pages
    owners, requests = np.full(spec.shape.rows + spec.shape.chunk_tokens, nobody, np.int32), {}
    for number, (scheduled, slots) in enumerate(zip(output.chunks, chunk_slots(spec, output), strict=True)):
        pooling = scheduled.request.pooling
        if pooling is not None and (wanted := pooling.wanted(scheduled.start, scheduled.start + scheduled.count)):
            owners[slots.start + wanted.start - scheduled.start : slots.stop] = number
            requests[number] = scheduled.request
    return PoolingPlan(owners, requests)
