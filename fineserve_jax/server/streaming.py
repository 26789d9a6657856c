"""Pieces of answers as chunks: server-sent events, each with what came since the one before."""

from collections.abc import Iterator
from typing import Any

from fineserve_jax.engine.tickets import Piece, Ticket
from fineserve_jax.openai_api.answers import answer_head
from fineserve_jax.openai_api.fields import Form
from fineserve_jax.openai_api.json_objects import encode_json
from fineserve_jax.openai_api.logprobs import Echo, chat_logprobs, logprob_entries, text_logprobs

NO_ECHO = Echo("", None, is_wanted=False)
END = b"data: [DONE]\n\n"


def event(content: Any) -> bytes:
    """One event, of JSON."""
    return b"data: " + encode_json(content) + b"\n\n"


class Chunks:
    """Makes the chunks of one streamed answer.

    Args:
        form: of its endpoint.
        token: what no other answer's id has.
        created: seconds of Unix time.
        model: that answers.
        tells_usage: chunks have a field for it, which is null in all but the last.
    """

    def __init__(self, form: Form, token: str, created: int, model: str, tells_usage: bool) -> None:
        self._is_chat, self._tells_usage = form == "chat", tells_usage
        self._head = answer_head(form, token, created, model, is_chunk=True)
        # What is the same in all chunks is made once.
        self._before = b"data: " + encode_json(self._head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if tells_usage else b"]}\n\n"
        self._offsets: dict[int, int] = {}  # characters of each sample's tokens so far

    def opening(self, num_samples: int) -> Iterator[bytes]:
        """What comes before any text: whose turn it is."""
        if self._is_chat:
            for index in range(num_samples):
                yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def chunks(self, ticket: Ticket, piece: Piece) -> Iterator[bytes]:
        """The chunks of a piece; none if there is nothing in it to be told."""
        index = ticket.index * ticket.prepared.sampling.n + piece.sample
        logprobs = self._logprobs(index, ticket, piece)
        reason = None if piece.finish_reason is None else str(piece.finish_reason)
        if self._is_chat:
            if piece.text or logprobs is not None:
                yield self._chunk(index, {"content": piece.text}, logprobs, None)
            if reason is not None:
                yield self._chunk(index, {}, None, reason)
        elif piece.text or logprobs is not None or reason is not None:
            yield self._chunk(index, piece.text, logprobs, reason)

    def usage(self, usage: dict[str, int], used: dict[str, Any]) -> bytes:
        """The last chunk, of no choices. `used`: further fields."""
        return event({**self._head, "choices": [], "usage": usage, **used})

    def _logprobs(self, index: int, ticket: Ticket, piece: Piece) -> dict[str, Any] | None:
        entries = logprob_entries(ticket.prepared.served.tokenizer, piece.token_ids, piece.logprobs)
        if not entries:
            return None
        if self._is_chat:
            return chat_logprobs(entries)
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + sum(len(entry["text"]) for entry in entries)
        return text_logprobs(entries, NO_ECHO, offset)

    def _chunk(self, index: int, said: Any, logprobs: dict[str, Any] | None, reason: str | None) -> bytes:
        """`said`: the delta of a chat's message, or text."""
        name = "delta" if self._is_chat else "text"
        choice = {"index": index, name: said, "logprobs": logprobs, "finish_reason": reason}
        return self._before + encode_json(choice) + self._after
