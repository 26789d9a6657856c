"""How far one sequence has come in its grammar, and the tokens that may follow."""

import functools
from collections.abc import Sequence
from typing import Self

import numpy as np
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par

DEAD_END = "no token of the model continues the text"
WITHOUT_TOKEN = ("NoExtension", "Parser Error: token")
"""How llguidance's messages for that begin."""


class TokenMatcher:
    """A grammar's place in one sequence of tokens.

    Args:
        state: llguidance's; nobody else's.
        end: the token that stands for the end of the text.

    Attributes:
        error: why it cannot go on; None: it can.
        is_complete: nothing may follow any more.
    """

    def __init__(self, state: LLMatcher, end: int) -> None:
        self._state, self.end = state, end
        self.is_complete = False
        self.error: str | None = None
        self._note_state()

    def copy(self) -> Self:
        """Another sequence that has come as far."""
        return type(self)(self._state.deep_copy(), self.end)

    def begin_with(self, tokens: Sequence[int]) -> None:
        """Begins again, and goes on by these tokens."""
        self._state.reset()
        self._state.consume_tokens(list(tokens))
        self._note_state()

    def accept(self, token: int) -> None:
        """Goes on by a token; once it is complete, or cannot go on, by any."""
        if not self.is_complete and self.error is None:
            self._state.consume_token(token)
            self._note_state()

    def _note_state(self) -> None:
        if self._state.is_error():
            error = plain(self._state.get_error())
            self.error = DEAD_END if error.startswith(WITHOUT_TOKEN) else error
        self.is_complete = self.error is None and self._state.is_stopped()


def fill_bitmask(matchers: Sequence[TokenMatcher | None], bitmask: np.ndarray) -> None:
    """Writes which tokens may come next, in parallel and without the interpreter's lock.

    Args:
        matchers: one for each row that is to be written.
        bitmask: i32[rows, words]; bit i of word w is for token 32 w + i. Rows without a matcher are left as they are.
    """
    rows = [(matcher._state, row) for row, matcher in enumerate(matchers) if matcher is not None]
    if rows:
        fill_next_token_bitmask_par(_executor(), rows, bitmask)
    for matcher in matchers:
        if matcher is not None:
            matcher._note_state()


def plain(message: str) -> str:
    """What llguidance says, on a line and without its state."""
    return " ".join(message.split("<")[0].split())


@functools.cache
def _executor() -> LLExecutor:
    return LLExecutor()
