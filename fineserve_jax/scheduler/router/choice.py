"""The choice among replicas: targets first, then the time until the answer is complete."""

from collections.abc import Sequence
from dataclasses import dataclass

ABOUT = 0.1
"""Predictions that differ by this part are about the same: they err as much."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a replica is predicted to give a request.

    Attributes:
        ttft_s: seconds until its first token.
        tpot_s: seconds for each further one.
        num_requests: that the replica has.
        cached_tokens: of the request's prompt.
    """

    ttft_s: float
    tpot_s: float
    num_requests: int
    cached_tokens: int = 0

    def done_s(self, output_tokens: float) -> float:
        """Seconds until an answer of so many tokens is complete."""
        return self.ttft_s + max(0.0, output_tokens - 1) * self.tpot_s

    def num_missed(self, ttft_slo_s: float | None, tpot_slo_s: float | None) -> int:
        """How many of the request's targets would be missed."""
        ttft_is_late = ttft_slo_s is not None and self.ttft_s > ttft_slo_s
        return ttft_is_late + (tpot_slo_s is not None and self.tpot_s > tpot_slo_s)


def choose(
    outlooks: Sequence[Outlook], output_tokens: float, ttft_slo_s: float | None = None, tpot_slo_s: float | None = None
) -> int:
    """The number of the replica that a request goes to: of those that would miss the fewest of its targets the one
    that would be done first. Of those that are done at about the same time it is the one that has most of its prompt
    cached, then the one with the fewest requests.

    Args:
        outlooks: one for each replica, at least one.
        output_tokens: expected of the request.
        ttft_slo_s, tpot_slo_s: its targets, seconds; None: it has none.
    """

    missed = [outlook.num_missed(ttft_slo_s, tpot_slo_s) for outlook in outlooks]
    done_s = [outlook.done_s(output_tokens) for outlook in outlooks]
    fewest = [number for number, count in enumerate(missed) if count == min(missed)]
    latest_s = (1 + ABOUT) * min(done_s[number] for number in fewest)

    def rank(number: int) -> tuple[int, int, float, int]:
        return -outlooks[number].cached_tokens, outlooks[number].num_requests, done_s[number], number

    return min((number for number in fewest if done_s[number] <= latest_s), key=rank)
