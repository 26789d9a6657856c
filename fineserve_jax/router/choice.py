"""The choice among replicas: targets first, then the time until the answer is complete."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a replica is predicted to give a request.

    Attributes:
        ttft_s: seconds until its first token.
        tpot_s: seconds for each further one.
        num_requests: that the replica has.
    """

    ttft_s: float
    tpot_s: float
    num_requests: int

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
    that would be done first; of equals the one with the fewest requests, and then the first.

    Args:
        outlooks: one for each replica, at least one.
        output_tokens: expected of the request.
        ttft_slo_s, tpot_slo_s: its targets, seconds; None: it has none.
    """

    def rank(number: int) -> tuple[int, float, int, int]:
        outlook = outlooks[number]
        missed = outlook.num_missed(ttft_slo_s, tpot_slo_s)
        return missed, outlook.done_s(output_tokens), outlook.num_requests, number

    return min(range(len(outlooks)), key=rank)
