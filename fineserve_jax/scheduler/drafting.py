"""A request's drafts: where they come from, and the share of them that is accepted."""

from collections.abc import Sequence

from fineserve_jax.scheduler.lookup import Lookup

REMEMBERING = 0.9  # weight of what was seen of a request's drafts, after each step that had some
FADING = 0.995  # the same after a step that might have had some: they are tried again after a while


class Drafting:
    """What is known of one request's drafts.

    Args:
        token_ids: the request's, which grow.

    Attributes:
        lookup: where drafts come from.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self.lookup = Lookup(token_ids)
        self._accepted, self._tried = 0.0, 0.0

    @property
    def share(self) -> float:
        """Expected share of accepted drafts, of those that are tried: those behind a refused one are not. 1 before any
        was, so that a request's first are tried."""
        return (self._accepted + 1.0) / (self._tried + 1.0)

    def note(self, offered: int, accepted: int) -> None:
        """Count a step that had so many drafts, of which the first so many were accepted."""
        self._keep(REMEMBERING)
        self._accepted += accepted
        self._tried += accepted + (accepted < offered)

    def fade(self) -> None:
        """Forget a little: a step might have had drafts and had none, as they did not pay."""
        self._keep(FADING)

    def _keep(self, weight: float) -> None:
        self._accepted, self._tried = weight * self._accepted, weight * self._tried
