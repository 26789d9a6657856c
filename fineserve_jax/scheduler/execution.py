"""Level 2: what of the running requests is computed in the next step.

Every request whose prompt is computed decodes. Decoding is bound by bandwidth, so prefill chunks ride along: as
many tokens as the profile says fit under the tightest time-per-token target among the decoding requests, or
without a target as many as `max_chunk_tokens`, which gives the most tokens a second; see `chunk_sizes`.

A target is for a request's tokens on average, so what counts is when the next one is *due*: as long after the first as
the target allows to the tokens between. The time of a request that is ahead is used for prefill; one that is behind
needs steps that are shorter than its target until it has caught up.
"""

import math
from collections.abc import Iterable

from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.scheduler.chunk_sizes import ChunkSizes
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.running_request import RunningRequest
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

CATCHING_UP = 0.75
"""Seconds of a step, as a share of a request's target, for one that is behind."""


def schedule_step(
    requests: Iterable[RunningRequest], config: SchedulerConfig, profile: StepProfile, now: float
) -> SchedulerOutput:
    """The next step of one model.

    Args:
        requests: its running requests, in the order of admission; those that decode have grown already.
        config: chunk rules.
        profile: predicts the model's step time.
        now: when the step begins.
    """
    if config.reproducible:
        return _reproducible_step(requests, config.max_chunk_tokens)
    decodes: list[ScheduledChunk] = []
    prefilling: list[RunningRequest] = []
    for running in requests:
        request = running.request
        if request.is_decoding:
            decodes.append(ScheduledChunk(request, request.num_computed_tokens, 1))
        else:
            prefilling.append(running)
    if not prefilling:
        return SchedulerOutput(tuple(decodes), ())
    target_s = _time_for_step(decodes, now) if config.slo_aware else math.inf
    prefilling.sort(key=_prefill_order)
    chunks = ChunkSizes(config, profile, decodes, target_s).fill([running.request for running in prefilling])
    return SchedulerOutput(tuple(decodes), tuple(chunks))


def _reproducible_step(requests: Iterable[RunningRequest], chunk_tokens: int) -> SchedulerOutput:
    """A step in which each token is computed as it would be for its request alone: a prompt in chunks that begin at
    multiples of `chunk_tokens`, of which a step has one and nothing else, and all other tokens one by one, also those
    that were sampled before the request lost its pages."""
    decodes: list[ScheduledChunk] = []
    prefilling: list[RunningRequest] = []
    for running in requests:
        request = running.request
        if request.num_prompt_tokens - request.num_computed_tokens > 1:
            prefilling.append(running)
        else:
            decodes.append(ScheduledChunk(request, request.num_computed_tokens, 1))
    if not prefilling:
        return SchedulerOutput(tuple(decodes), ())
    request = min(prefilling, key=_prefill_order).request
    start = request.num_computed_tokens
    chunk = ScheduledChunk(request, start, min(chunk_tokens, request.num_prompt_tokens - start))
    return SchedulerOutput((), (chunk,)) if chunk.count > 1 else SchedulerOutput((chunk,), ())


def due_s(request: Request, tpot_slo_s: float, now: float) -> float:
    """When the request's next token is due."""
    first = request.times.first_token_s
    return (
        now + tpot_slo_s if first is None else first + tpot_slo_s * (len(request.token_ids) - request.num_prompt_tokens)
    )


def _prefill_order(running: RunningRequest) -> tuple[object, ...]:
    """By admission pass; in one pass as the queue had them, and among equals the least work first."""
    request, entry = running.request, running.entry
    queued = (entry.priority, entry.rank, entry.key)
    return (running.admission_pass, queued, request.num_uncomputed_tokens, request.sequence)


def _time_for_step(decodes: Iterable[ScheduledChunk], now: float) -> float:
    """Seconds that the next step may take for the decoding requests; written out, as it is run for each of a step."""
    shortest_s = math.inf
    for scheduled in decodes:
        request = scheduled.request
        tpot_slo_s = request.options.tpot_slo_s
        if tpot_slo_s is None:
            continue
        least_s = CATCHING_UP * tpot_slo_s
        if least_s < shortest_s:
            shortest_s = min(shortest_s, max(due_s(request, tpot_slo_s, now) - now, least_s))
    return shortest_s
