"""Drafts by look-up: what followed when a text last came to where it is now, in the prompt or in the answer so far.

    ... the cat sat on the mat. Then the cat sat        the last tokens, "the cat sat", were there before
                ^^^^^^^^^^^                             and "on the mat" followed: that is the draft

No second model is needed (prompt lookup decoding: Saxena, github.com/apoorvumang/prompt-lookup-decoding, 2023).
"""

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that have to agree; the longest agreement counts, and of that length the latest


class Lookup:
    """Finds drafts for one sequence, in time that does not depend on its length.

    Args:
        token_ids: the sequence, which may grow and does not change otherwise.
    """

    def __init__(self, token_ids: Sequence[int]) -> None:
        self._token_ids = token_ids
        self._num_entered = 1  # places that are entered as followers; nothing is ahead of the first
        self._follower_of: dict[tuple[int, ...], int] = {}

    def find(self, most: int) -> tuple[int, ...]:
        """Up to `most` tokens that may follow the sequence; none if its last ones were not there before."""
        tokens = self._token_ids
        # The end of the sequence is entered when something follows it, so that it is not found itself.
        for place in range(self._num_entered, len(tokens)):
            for length in range(SHORTEST, min(LONGEST, place) + 1):
                self._follower_of[tuple(tokens[place - length : place])] = place
        self._num_entered = max(self._num_entered, len(tokens))
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            found = self._follower_of.get(tuple(tokens[len(tokens) - length :]))
            if found is not None:
                return self._copied(found, most)
        return ()

    def _copied(self, place: int, most: int) -> tuple[int, ...]:
        """The tokens from `place` on; where they reach the end of the sequence, they go on with themselves."""
        tokens, drafts = self._token_ids, list[int]()
        for source in range(place, place + most):
            drafts.append(tokens[source] if source < len(tokens) else drafts[source - len(tokens)])
        return tuple(drafts)
