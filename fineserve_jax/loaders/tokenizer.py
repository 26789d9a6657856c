"""Text to token ids and back, whatever file the vocabulary came from."""

import dataclasses
import functools
from collections.abc import Sequence

import tokenizers

from fineserve_jax.errors import RequestError
from fineserve_jax.loaders.stream_decoder import ByteStreamDecoder, StreamDecoder, WindowStreamDecoder
from fineserve_jax.loaders.token_bound import TokenBound, token_bound
from fineserve_jax.loaders.token_bytes import ByteRule, byte_rule
from fineserve_jax.request.structured.vocabulary import Vocabulary

# Tokens by which chat models end a turn; generation stops at them although only some files list them.
END_OF_TURN_TOKENS = (
    *("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>"),
    *("<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<turn|>"),
    *("<\uff5cend▁of▁sentence\uff5c>", "[e~["),
)
# Where a model has both of a pair, "<|end|>" ends a message only, and another one follows in the same turn.
_TURNS_OF_MESSAGES = (("<|return|>", "<|call|>"), ("<|calls|>", "<|flush|>"))


def special_ids(backend: tokenizers.Tokenizer) -> dict[str, int]:
    """Text -> id of the special tokens."""
    return {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}


def end_of_turn_ids(backend: tokenizers.Tokenizer) -> list[int]:
    """Ids of those end-of-turn tokens that `backend` knows as special ones."""
    special = special_ids(backend)
    names = [name for name in END_OF_TURN_TOKENS if name in special]
    if any(special.keys() >= set(pair) for pair in _TURNS_OF_MESSAGES):
        names = [name for name in names if name != "<|end|>"]
    return [special[name] for name in names]


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its special tokens.

    backend: the `tokenizers` object that does the work.
    eos_token_ids: generation ends at any of these.
    bos_token_id: first token of a sequence where the model has one; whether `encode` adds it is the file's own rule.
    chat_template: Jinja source of the default template, or None for a model without one.
    special_tokens: named tokens a chat template may ask for, e.g. {"bos_token": "<s>"}.
    chat_templates: Jinja sources of further templates by name, such as "tool_use".
    duplicates: ids that `backend` does not know, each with the id of the same text that it does know.
    """

    backend: tokenizers.Tokenizer
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None = None
    chat_template: str | None = None
    special_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    chat_templates: dict[str, str] = dataclasses.field(default_factory=dict)
    duplicates: dict[int, int] = dataclasses.field(default_factory=dict)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return self.backend.get_vocab_size(with_added_tokens=True) + len(self.duplicates)

    def encode(self, text: str, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of `text`. Special tokens written out in the text become their ids.

        add_special_tokens: also add what the model expects around a text (mostly a leading BOS); leave it off for
            rendered chats, whose template writes these itself.
        max_tokens: a text that is so long that it is certain to have more is refused before any work; None: none is.

        Raises RequestError for a text that is not valid Unicode, or longer than that.
        """
        if max_tokens is not None and len(text) > max_tokens:  # else the bound, too, is under it
            least = self._bound.least_tokens(text) if self._bound else 0
            if least > max_tokens:
                raise RequestError(
                    f"the prompt has {len(text)} characters, which are at least {least} tokens; it may have "
                    f"{max_tokens}; shorten it or raise max_seq_len"
                )
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

    def encode_prompt(self, text: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of a plain prompt, special tokens added.

        Raises RequestError for an empty text, which a BOS alone would not make a prompt, and as `encode` does.
        """
        if not text:
            raise RequestError("the prompt is empty; give at least one token")
        return self.encode(text, max_tokens=max_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        known = [self.duplicates.get(i, i) for i in ids] if self.duplicates else list(ids)
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, as stored; None when there is none."""
        return self.backend.id_to_token(self.duplicates.get(token_id, token_id))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for, special ones included; tokens in a row may share a character."""
        text = self.token_text(token_id)
        if text is None:
            return b""
        if self._rule is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        return self._rule.to_bytes(text)

    def vocabulary(self, size: int) -> Vocabulary:
        """What grammars need to know of the first `size` ids, some of which may be no tokens.

        Made when first asked for, which takes half a second for 50,000 tokens.

        Raises RequestError for a tokenizer whose tokens have no bytes of their own: the text of each depends on others.
        """
        if size not in self._vocabularies:
            self._vocabularies[size] = self._vocabulary(size)
        return self._vocabularies[size]

    def _vocabulary(self, size: int) -> Vocabulary:
        if self._rule is None:
            raise RequestError(
                "structured_outputs need a tokenizer each of whose tokens stands for the same bytes everywhere, which "
                "this model's does not; leave them out, or use another model"
            )
        special = frozenset(self.special_ids.values())
        encode = functools.partial(self.encode, add_special_tokens=False)
        return Vocabulary([self.token_bytes(i) for i in range(size)], [i for i in range(size) if i in special], encode)

    def stream(self, skip_special_tokens: bool = True, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """A decoder for tokens that arrive one by one.

        Args:
            skip_special_tokens: special tokens have no text.
            prompt_ids: what the tokens continue: a space that is dropped at the beginning of a text is kept behind it.

        Its pieces together are what `decode` gives for all ids (but with byte fallback, malformed bytes become
        U+FFFD without changing what is around them).
        """
        special = frozenset(self.special_ids.values())
        skipped = special if skip_special_tokens else frozenset[int]()
        if self._rule is None:
            decode = functools.partial(self.decode, skip_special_tokens=skip_special_tokens)
            return WindowStreamDecoder(decode, prompt_ids)
        begins = special.issuperset(prompt_ids)
        known: dict[int, bytes] = self._known_bytes

        def bytes_of(token_id: int) -> bytes:
            if token_id in skipped:
                return b""
            if token_id not in known:
                known[token_id] = self.token_bytes(token_id)
            return known[token_id]

        return ByteStreamDecoder(bytes_of, self._rule.strip if begins else 0)

    @functools.cached_property
    def _rule(self) -> ByteRule | None:
        return byte_rule(self.backend)

    @functools.cached_property
    def special_ids(self) -> dict[str, int]:
        """Text -> id of the special tokens."""
        return special_ids(self.backend)

    @functools.cached_property
    def _bound(self) -> TokenBound | None:
        return token_bound(self.backend)

    @functools.cached_property
    def _known_bytes(self) -> dict[int, bytes]:
        return {}

    @functools.cached_property
    def _vocabularies(self) -> dict[int, Vocabulary]:
        return {}
