"""Incremental detokenization: the text of a request, decoded as its tokens come."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fineserve_jax.loaders.stream_decoder import StreamDecoder
from fineserve_jax.loaders.tokenizer import Tokenizer


@dataclass(slots=True)
class IncrementalDetokenizer:
    """The text of one sequence: decoded as tokens come, and cut where a stop string begins.

    Text that may yet turn out to be the beginning of a stop string is held back from `take`.
    """

    tokenizer: Tokenizer
    stop: Sequence[str]
    text: str = ""
    stopped: bool = False
    _taken: int = 0
    _decoder: StreamDecoder = field(init=False)

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.stream()

    def push(self, token: int) -> bool:
        """Adds a token; returns whether a stop string was completed."""
        return self._extend(self._decoder.push(token))

    def finish(self) -> None:
        """No more tokens will come: everything that is left may be taken."""
        if not self.stopped:
            self._extend(self._decoder.flush())
            self.stopped = True

    def take(self) -> str:
        """The text that became certain since the last call."""
        end = len(self.text) if self.stopped else len(self.text) - self._held_back()
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _extend(self, piece: str) -> bool:
        # A stop string may have begun in what came before.
        start = max(0, len(self.text) - max((len(s) for s in self.stop), default=0))
        self.text += piece
        found = [at for s in self.stop if (at := self.text.find(s, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return bool(found)

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (
            n for s in self.stop for n in range(min(len(s) - 1, len(self.text)), 0, -1) if self.text.endswith(s[:n])
        )
        return max(lengths, default=0)
