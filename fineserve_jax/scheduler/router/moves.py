"""Moving requests that still wait: away from replicas that are short of memory, to where they begin much sooner."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

LEAST_GAIN_S = 0.25
LEAST_GAIN = 0.5
"""What a move has to gain, in seconds and of the wait, lest requests go to and fro where predictions err."""


@dataclass(frozen=True, slots=True)
class Waiting(Generic[T]):
    """A request that a replica has not begun.

    Attributes:
        what: the request.
        wait_s: predicted until it begins there.
    """

    what: T
    wait_s: float


@dataclass(frozen=True, slots=True)
class Queue(Generic[T]):
    """What waits at a replica.

    Attributes:
        is_short: requests wait there for memory, or for a place in a batch, in vain.
        waiting: in the order in which they will begin.
    """

    is_short: bool
    waiting: Sequence[Waiting[T]]


def find_moves(
    queues: Mapping[str, Queue[T]], wait_s: Callable[[str, T, int], float | None], most: int
) -> list[tuple[T, str, str]]:
    """Requests to move, each with the replicas it goes from and to: of those that are short, the requests that would
    begin last go first, each to where it begins soonest, if that is worth it. None goes to a replica that is short.

    Args:
        queues: by replica.
        wait_s: predicted until a request begins at a replica to which so many are moved before it; None: it cannot be
            served there.
        most: moves at a time.
    """
    found: list[tuple[T, str, str]] = []
    moved_to = dict.fromkeys(queues, 0)
    listed = [(one, name) for name, queue in queues.items() if queue.is_short for one in queue.waiting]
    for one, source in sorted(listed, key=lambda entry: -entry[0].wait_s):
        others = [name for name, queue in queues.items() if name != source and not queue.is_short]
        waits = {name: wait for name in others if (wait := wait_s(name, one.what, moved_to[name])) is not None}
        target = min(waits, key=waits.__getitem__, default=None)
        if target is None or one.wait_s - waits[target] < max(LEAST_GAIN_S, LEAST_GAIN * one.wait_s):
            continue
        found.append((one.what, source, target))
        moved_to[target] += 1
        if len(found) == most:
            break
    return found
