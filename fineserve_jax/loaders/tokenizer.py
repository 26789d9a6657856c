"""Text to token ids and back, whatever file the vocabulary came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import tokenizers

from fineserve_jax.errors import RequestError

# Tokens by which chat models end a turn; generation stops at them although only some files list them.
END_OF_TURN_TOKENS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>")


def end_of_turn_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """Ids of those end-of-turn tokens that `backend` knows as special ones."""
    special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    return [special[name] for name in END_OF_TURN_TOKENS if name in special]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its special tokens.

    backend: the `tokenizers` object that does the work.
    eos_token_ids: generation ends at any of these.
    bos_token_id: first token of a sequence where the model has one; whether `encode` adds it is the file's own rule.
    chat_template: Jinja source, or None for a model without one.
    special_tokens: named tokens a chat template may ask for, e.g. {"bos_token": "<s>"}.
    other_templates: names of the chat templates of a model that has several but no default.
    duplicates: ids that `backend` does not know, each with the id of the same text that it does know.
    """

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    other_templates: tuple[str, ...] = ()
    duplicates: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True) + len(self.duplicates)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids.

        add_special_tokens: also add what the model expects around a text (mostly a leading BOS); leave it off for
            rendered chats, whose template writes these itself.

        Raises RequestError for a text that is not valid Unicode.
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeError):  # how the backend refuses what UTF-8 cannot hold
            place = next((i for i, character in enumerate(text) if "\ud800" <= character <= "\udfff"), None)
            if place is None:
                raise
            raise RequestError(
                f"the text is not valid Unicode: character {place} is {text[place]!a}, half of a surrogate pair; "
                "decode the text from the encoding it is in, or replace that character"
            ) from None

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a plain prompt, special tokens added.

        Raises RequestError for an empty text, which a BOS alone would not make a prompt, and as `encode` does.
        """
        if not text:
            raise RequestError("the prompt is empty; give at least one token")
        return self.encode(text)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        known = [self.duplicates.get(i, i) for i in ids] if self.duplicates else list(ids)
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, as stored; None when there is none."""
        return self.backend.id_to_token(self.duplicates.get(token_id, token_id))

    def stream(self, skip_special_tokens: bool = True) -> StreamDecoder:
        """A decoder for tokens that arrive one by one."""
        return StreamDecoder(self, skip_special_tokens)


class StreamDecoder:
    """Text of a growing sequence, piece by piece. A piece never ends inside a UTF-8 character.

    The pieces of all `push` calls and of `flush` together are what `Tokenizer.decode` gives for all ids (with byte
    fallback, malformed bytes right behind a character already sent come out as U+FFFD without changing it).

    Only a short window is decoded each time: the tokens of the last piece, which settle spacing, and the new ones.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special_tokens
        self._context: list[int] = []  # tokens whose text was sent
        self._pending: list[int] = []  # tokens that end inside a character

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty while a character is still incomplete."""
        self._pending.append(token_id)
        piece = self._pending_text()
        if piece.endswith("\ufffd"):
            return ""
        # A token without text of its own (a special one) must not push the context out of the window.
        self._context = self._pending if piece else self._context + self._pending
        self._pending = []
        return piece

    def flush(self) -> str:
        """What is left at the end of the sequence: U+FFFD for each broken character."""
        piece = self._pending_text() if self._pending else ""
        self._context, self._pending = self._context + self._pending, []
        return piece

    def _pending_text(self) -> str:
        sent = self._tokenizer.decode(self._context, self._skip) if self._context else ""
        return self._tokenizer.decode(self._context + self._pending, self._skip)[len(sent) :]
