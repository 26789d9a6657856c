"""The text of a request: decoded by whoever reads it, when it is read, so that no step waits for it.

Only where stop strings may end the request does the engine have to decode each token as it comes. What is known of the
tokens is then told to readers in one assignment, so that a thread that reads sees either all of a step or nothing.
"""

from typing import NamedTuple

from fineserve_jax.engine.detokenizer import IncrementalDetokenizer
from fineserve_jax.loaders.tokenizer import Tokenizer
from fineserve_jax.request.request import FinishReason, Request


class Known(NamedTuple):
    """What may be read of a request: its first `num_tokens` output tokens, and how it ended.

    Attributes:
        has_ended: no more tokens will come.
        at_stop_token: the last of them ended it, and has no text.
    """

    num_tokens: int
    has_ended: bool = False
    at_stop_token: bool = False


class RequestText:
    """The text of one request.

    The engine's thread calls `accept`, `end` and `roll_back`; one other thread may call `take` and read `text`.

    Args:
        request: whose tokens are read.
        tokenizer: of its model.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self._request, self._tokenizer = request, tokenizer
        self._is_eager = bool(request.sampling.stop)
        self._known = Known(0)
        self._taken = 0
        self._begin()

    def _begin(self) -> None:
        request = self._request
        self._detokenizer = IncrementalDetokenizer(self._tokenizer, request.sampling, request.prompt_token_ids)
        self._decoded = Known(0)
        self._certain = ""
        self._is_decoding = False

    # -- the engine's thread -------------------------------------------------------------------------------------

    @property
    def num_accepted(self) -> int:
        """Output tokens that count: the engine has decided of each whether it ends the request."""
        return self._known.num_tokens

    def completes_stop_string(self) -> bool:
        """Whether a stop string ends with the tokens so far, of which the last is not accepted yet."""
        if not self._is_eager:
            return False
        self._decode(Known(self._request.num_output_tokens))
        return self._detokenizer.stopped

    def accept(self) -> None:
        """All of the request's output tokens count, and more will come."""
        self._known = Known(self._request.num_output_tokens)

    def end(self) -> None:
        """All of the request's output tokens count, and none will come: it has a reason to be finished."""
        request, count = self._request, self._request.num_output_tokens
        last = request.token_ids[-1] if count else None
        known = Known(count, True, request.finish_reason is FinishReason.STOP and last in request.stop_ids)
        if self._is_eager:
            self._decode(known)
        self._known = known

    def roll_back(self) -> None:
        """Forgets tokens that were not accepted, the request's own record of them too."""
        request, count = self._request, self.num_accepted
        del request.token_ids[request.num_prompt_tokens + count :]
        del request.logprobs[count:]
        if self._is_eager:
            self._begin()

    # -- whoever reads -------------------------------------------------------------------------------------------

    @property
    def known(self) -> Known:
        """What may be read of the request now. What is known of an end stays so."""
        return self._known

    @property
    def text(self) -> str:
        """So far, without what may yet turn out to be the beginning of a stop string."""
        if not self._is_eager:
            self._decode(self._known)
        return self._certain

    def take(self) -> str:
        """The text that became certain since the last call."""
        text = self.text
        piece = text[self._taken :]
        self._taken = max(self._taken, len(text))
        return piece

    def _decode(self, known: Known) -> None:
        """Decodes what is known and not decoded yet; all of it, if that was cut short before."""
        if self._is_decoding:
            self._begin()
        if known == self._decoded:
            return
        self._is_decoding = True
        request, detokenizer = self._request, self._detokenizer
        first = request.num_prompt_tokens
        stop = first + known.num_tokens - known.at_stop_token
        for token in request.token_ids[first + self._decoded.num_tokens : stop]:
            detokenizer.push(token)
        if known.has_ended:
            if known.at_stop_token:
                detokenizer.stop_at(request.token_ids[stop])
            detokenizer.finish()
        self._certain, self._decoded = detokenizer.certain, known
        self._is_decoding = False
