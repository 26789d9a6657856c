"""Grammars over one model's tokens."""

import functools
from collections.abc import Callable, Collection, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from fineserve_jax.errors import RequestError
from fineserve_jax.request.structured.matcher import TokenMatcher
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.validation import shortened

MOST_KEPT = 128
"""Compiled grammars that are kept, those used last."""


class Vocabulary:
    """A model's tokens, as grammars see them: its text is the bytes of its tokens, one after another.

    The end of a text is a token of its own, `end`, behind those of the model, so that it makes no difference which
    and how many end-of-sequence tokens the model has.

    Args:
        token_bytes: of each token, none for one without text.
        special_ids: tokens that no text holds.
        encode: text to token ids.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], special_ids: Collection[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.end = len(token_bytes)
        tokens = _Tokens(token_bytes, special_ids, encode)
        self._tokenizer = LLTokenizer(TokenizerWrapper(tokens))
        tokens.split_greedily = self._tokenizer.greedy_tokenize
        self._compiled = functools.lru_cache(MOST_KEPT)(self._compile)

    def matcher(self, params: StructuredOutputsParams) -> TokenMatcher:
        """At the beginning of a text. Raises `RequestError` for a grammar that cannot be had with this vocabulary."""
        return self._compiled(params.text).copy()

    def _compile(self, grammar: str) -> TokenMatcher:
        matcher = TokenMatcher(
            LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False)), self.end
        )
        if matcher.error is not None:
            raise RequestError(f"structured_outputs cannot be kept to: {shortened(matcher.error)}; simplify it")
        return matcher


class _Tokens:
    """What llguidance asks of a tokenizer, by the names it asks by.

    Attributes:
        split_greedily: text to token ids, each the longest that fits; where no token fits, bytes are passed over.
    """

    def __init__(
        self, token_bytes: Sequence[bytes], special_ids: Collection[int], encode: Callable[[str], list[int]]
    ) -> None:
        self.tokens = [*token_bytes, b"<end of the text>"]
        self.eos_token_id, self.bos_token_id = len(token_bytes), None
        self.special_token_ids = [*special_ids, self.eos_token_id]
        self.split_greedily = encode
        self._encode = encode

    def __call__(self, text: str) -> list[int]:
        """Tokens of a text, or of its beginning if no tokens have the bytes of the rest.

        What is said here is believed, so it is only tokens that have these very bytes: those of unknown characters, or
        with a space before the text, have not.
        """
        data = text.encode()
        tokens = self._with_bytes(self._encode(text), data)
        if b"".join(self.tokens[token] for token in tokens) == data:
            return tokens
        return self._with_bytes(self.split_greedily(text), data)

    def _with_bytes(self, tokens: Sequence[int], data: bytes) -> list[int]:
        """The first tokens, as far as they have the first bytes of `data`."""
        kept, at = list[int](), 0
        for token in tokens:
            piece = self.tokens[token] if token < len(self.tokens) else b""
            if not piece or not data.startswith(piece, at):
                break
            kept.append(token)
            at += len(piece)
        return kept
