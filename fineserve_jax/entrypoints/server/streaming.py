"""Pieces of answers as chunks: server-sent events, each with what came since the one before."""

from collections.abc import Collection, Iterator
from typing import Any

from fineserve_jax.engine.tickets import Piece, Ticket
from fineserve_jax.entrypoints.openai_api.answers import answer_head, finish_reason_of
from fineserve_jax.entrypoints.openai_api.fields import Form
from fineserve_jax.entrypoints.openai_api.json_objects import encode_json
from fineserve_jax.entrypoints.openai_api.logprobs import Echo, chat_logprobs, logprob_entries, text_logprobs
from fineserve_jax.entrypoints.openai_api.tool_calls import Call, TextBeforeCalls, calls_message

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
        callable_names: functions whose calls in a chat's text are told as such, each at once when all are there.
    """

    def __init__(
        self,
        form: Form,
        token: str,
        created: int,
        model: str,
        tells_usage: bool,
        callable_names: Collection[str] = (),
    ) -> None:
        self._is_chat, self._tells_usage = form == "chat", tells_usage
        self._head = answer_head(form, token, created, model, is_chunk=True)
        # What is the same in all chunks is made once.
        self._before = b"data: " + encode_json(self._head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if tells_usage else b"]}\n\n"
        self._token, self._callable_names = token, callable_names
        self._before_calls: dict[int, TextBeforeCalls] = {}  # of each sample, where there may be calls
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
            text, calls = self._apart(index, piece)
            if text or logprobs is not None:
                yield self._chunk(index, {"content": text}, logprobs, None)
            for place, call in enumerate(calls_message(calls, self._token, index)):
                yield self._chunk(index, {"tool_calls": [{"index": place, **call}]}, None, None)
            if reason is not None:
                yield self._chunk(index, {}, None, finish_reason_of(reason, bool(calls)))
        elif piece.text or logprobs is not None or reason is not None:
            yield self._chunk(index, piece.text, logprobs, reason)

    def usage(self, usage: dict[str, int], used: dict[str, Any]) -> bytes:
        """The last chunk, of no choices. `used`: further fields."""
        return event({**self._head, "choices": [], "usage": usage, **used})

    def _apart(self, index: int, piece: Piece) -> tuple[str, list[Call]]:
        """The text that is to be told now, and with the last piece the calls."""
        if not self._callable_names:
            return piece.text, []
        before = self._before_calls.setdefault(index, TextBeforeCalls(self._callable_names))
        text = before.add(piece.text)
        if piece.finish_reason is None:
            return text, []
        rest, calls = before.end()
        return text + rest, calls

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
