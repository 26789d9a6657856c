"""Incremental detokenization: the text of a request, decoded as its tokens come."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from fineserve_jax.loaders.stream_decoder import StreamDecoder
from fineserve_jax.loaders.tokenizer import Tokenizer
from fineserve_jax.request.sampling_params import SamplingParams


@dataclass(slots=True)
class IncrementalDetokenizer:
    """The text of one sequence: decoded as tokens come, and cut where a stop string begins.

    A stop string counts if it ends behind the first `min_tokens` tokens. Text that may yet turn out to be the beginning
    of one is held back from `take`.

    Attributes:
        tokenizer: of the model.
        sampling: stop strings, and what of them and of special tokens the text holds.
        prompt_ids: what the text continues.
        text: so far.
        stopped: whether a stop string has ended it.
    """

    tokenizer: Tokenizer
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt_ids: Sequence[int] = ()
    text: str = ""
    stopped: bool = False
    _num_tokens: int = 0
    _exempt: int = 0  # characters of the first `min_tokens` tokens, in which no stop string ends
    _taken: int = 0
    _decoder: StreamDecoder = field(init=False)

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.stream(self.sampling.skip_special_tokens, self.prompt_ids)

    def push(self, token: int) -> bool:
        """Adds a token; returns whether a stop string was completed."""
        self._num_tokens += 1
        return self._extend(self._decoder.push(token))

    def stop_at(self, token: int) -> None:
        """A token that ended the request; its text is part of the answer only if it is a stop string to be included."""
        name = self.tokenizer.token_text(token)
        if self.sampling.include_stop_str_in_output and name in self.sampling.stop:
            self.text += self._decoder.flush() + str(name)

    def finish(self) -> None:
        """No more tokens will come: everything that is left may be taken."""
        if not self.stopped:
            self._extend(self._decoder.flush())
            self.stopped = True

    @property
    def certain(self) -> str:
        """The text so far, less what may yet turn out to be the beginning of a stop string."""
        return self.text if self.stopped else self.text[: len(self.text) - self._held_back()]

    def take(self) -> str:
        """The text that became certain since the last call."""
        certain = self.certain
        piece = certain[self._taken :]
        self._taken = max(self._taken, len(certain))
        return piece

    def _extend(self, piece: str) -> bool:
        before = len(self.text)
        self.text += piece
        if self._num_tokens <= self.sampling.min_tokens:
            self._exempt = len(self.text)
            return False
        # A stop string may have begun in what came before.
        ends = [
            (at, at + len(stop))
            for stop in self.sampling.stop
            if (at := self.text.find(stop, max(0, max(before, self._exempt) - len(stop) + 1))) >= 0
        ]
        if ends:
            begin, end = min(ends)
            self.text, self.stopped = self.text[: end if self.sampling.include_stop_str_in_output else begin], True
        return bool(ends)

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.sampling.include_stop_str_in_output:
            return 0
        lengths = (
            n
            for stop in self.sampling.stop
            for n in range(min(len(stop) - 1, len(self.text)), 0, -1)
            if self.text.endswith(stop[:n])
        )
        return max(lengths, default=0)
