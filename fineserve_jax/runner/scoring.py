"""Scores of prompt tokens: what a step gives for tokens whose successors are known.

    slots of a step   | decode rows | chunk | chunk |        only those are scored whose successors somebody asked for:
    scored                            xxxxx    xxx           their slots, packed into tiles, go through the head

so logits are there for a tile at a time, however long a prompt is, and a prompt's part that nobody asked for costs
nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

from fineserve_jax.models import ModelConfig
from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput, TokenScore
from fineserve_jax.runner.inputs import chunk_slots
from fineserve_jax.runner.sampler import likeliest
from fineserve_jax.runner.shapes import StepSpec

MOST_LOGITS = 2**23
"""Logits of a tile: 32 MiB of them."""

Array = Any  # numpy on the host, jax.Array in the step


class ScoreTile(NamedTuple):
    """Slots of a step that are scored together; padding repeats slot 0.

    Attributes:
        slots: i32[T], decode rows first, then chunk slots.
        targets: i32[T], the token that follows each.
        any_top: bool[], whether the likeliest tokens are wanted of any.
    """

    slots: Array
    targets: Array
    any_top: Array


class Scores(NamedTuple):
    """What a tile gives.

    Attributes:
        logprobs: f32[T], of the targets.
        is_greedy: bool[T], whether the target is the likeliest token, of equally likely ones the first.
        top_ids, top_logprobs: i32 and f32[T, MAX_TOP_LOGPROBS], the most likely tokens, likeliest first; zeros where
            none are wanted.
    """

    logprobs: Array
    is_greedy: Array
    top_ids: Array
    top_logprobs: Array


def score_logits(
    logits: Float32[jax.Array, "T vocab"], targets: Int32[jax.Array, " T"], any_top: Bool[jax.Array, ""]
) -> Scores:
    """The scores of a tile's targets. Of the logits nothing of their size is made."""
    peak = jnp.max(logits, axis=-1, keepdims=True)
    log_sum = jnp.log(jnp.sum(jnp.exp(logits - peak), axis=-1, keepdims=True))

    def logprobs(ids: Int32[jax.Array, "T ids"]) -> Float32[jax.Array, "T ids"]:
        return (jnp.take_along_axis(logits, ids, axis=-1) - peak) - log_sum

    def top() -> tuple[jax.Array, jax.Array]:
        ids = likeliest(logits)
        return ids, logprobs(ids)

    none = jax.tree.map(lambda part: jnp.zeros(part.shape, part.dtype), jax.eval_shape(top))
    is_greedy = jnp.argmax(logits, axis=-1) == targets
    return Scores(logprobs(targets[:, None])[:, 0], is_greedy, *jax.lax.cond(any_top, top, lambda: none))


@dataclass(frozen=True, slots=True)
class ScoringPlan:
    """What of a step is scored.

    Attributes:
        owners: the requests, each with how many of its tokens; in the order of the tiles' slots.
        tiles: for the device.
    """

    owners: list[tuple[Request, int]]
    tiles: list[ScoreTile]

    @property
    def keeps_hidden(self) -> bool:
        """Whether of any request what the last layer gives is to be kept."""
        return any(request.scores is not None and request.scores.hidden is not None for request, _ in self.owners)

    def collect_hidden(self, tiles: Sequence[np.ndarray]) -> dict[Request, np.ndarray]:
        """f32[tokens, hidden] of the requests that keep it. `tiles`: what the last layer gave for the slots of each."""
        if not tiles:
            return {}
        ends = np.cumsum([count for _, count in self.owners])
        parts = np.split(np.concatenate(tiles), ends)
        pairs = zip(self.owners, parts, strict=False)  # padding follows
        return {r: part for (r, _), part in pairs if r.scores is not None and r.scores.hidden is not None}

    def collect(self, tiles: Sequence[Scores]) -> dict[Request, list[TokenScore]]:
        """The scores of each request's tokens, in their order. `tiles`: what each gave, on the host."""
        if not tiles:
            return {}
        logprobs, is_greedy, top_ids, top_logprobs = (np.concatenate(parts) for parts in zip(*tiles, strict=True))
        found, first = {}, 0
        for request, count in self.owners:
            assert request.scores is not None, "only requests that want scores are planned for"
            own, width = slice(first, first + count), request.scores.num_top
            tops = zip(top_ids[own, :width].tolist(), top_logprobs[own, :width].tolist(), strict=True)
            rows = zip(logprobs[own].tolist(), is_greedy[own].tolist(), tops, strict=True)
            found[request] = [TokenScore(p, greedy, dict(zip(*top, strict=True))) for p, greedy, top in rows]
            first += count
        return found


def plan_scores(spec: StepSpec, output: SchedulerOutput) -> ScoringPlan:
    """Which slots of a step are scored: those of chunks, since a token that is computed by itself is the last."""
    if not output.prefills:
        return ScoringPlan([], [])
    owners, slots, targets, any_top = [], list[int](), list[int](), False
    for scheduled, own in zip(output.prefills, chunk_slots(spec, output)[len(output.decodes) :], strict=True):
        own_slots, own_targets = _scored(scheduled, own)
        if own_slots:
            request = scheduled.request
            owners.append((request, len(own_slots)))
            slots.extend(own_slots)
            targets.extend(own_targets)
            any_top |= request.scores is not None and request.scores.num_top > 0
    size = tile_size(spec)
    starts = range(0, len(slots), size)
    return ScoringPlan(owners, [_tile(slots[i : i + size], targets[i : i + size], size, any_top) for i in starts])


def takes_branches(config: ModelConfig, reproducible: bool, check_finite: bool) -> bool:
    """Whether chunks of a model may have branches: where positions tell of nothing but rotations, and nobody asks for
    the stage at which a branch stops being finite. For the arguments see `ModelRunner`."""
    has_windows = any(group.window is not None for group in config.layer_groups)
    return not (has_windows or config.long_after is not None or reproducible or check_finite)


def _scored(scheduled: ScheduledChunk, own: slice) -> tuple[list[int], list[int]]:
    """The slots of a chunk that are scored, and the token behind each. `own`: slots of the chunk, branches aside."""
    wanted = scheduled.scored
    slots = [own.start + index - 1 - scheduled.start for index in wanted]
    targets = scheduled.request.token_ids[wanted.start : wanted.stop]
    behind = own.stop
    for branch in scheduled.branches:
        slots += [own.stop - 1, *range(behind, behind + len(branch) - 1)]
        targets += branch
        behind += len(branch) - 1
    return slots, targets


def empty_tile(spec: StepSpec) -> ScoreTile:
    """A tile that scores nothing."""
    return _tile([], [], tile_size(spec), False)


def tile_size(spec: StepSpec) -> int:
    """Slots of a tile: as many as a step's chunks have, or as `MOST_LOGITS` allow."""
    return min(most_slots(spec.model.config.vocab_size), spec.shape.chunk_tokens)


def most_slots(vocab_size: int) -> int:
    """For how many positions `MOST_LOGITS` are enough: a power of two, and at least 8."""
    return 1 << (max(8, MOST_LOGITS // vocab_size).bit_length() - 1)


def _tile(slots: Sequence[int], targets: Sequence[int], size: int, any_top: bool) -> ScoreTile:
    padded = np.zeros((2, size), np.int32)
    padded[:, : len(slots)] = slots, targets
    return ScoreTile(padded[0], padded[1], np.bool_(any_top))
