"""How few tokens a text can have, told from its length, so that a text which is far too long is never tokenized.

The bound must not exceed what the tokenizer gives for any text. It counts on three things, and there is no bound for a
tokenizer of which one of them is not certain: normalization shortens a text by a known factor at most; no character is
dropped; and no token stands for more characters than its entry in the vocabulary has.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import tokenizers

# A canonical decomposition has at most four characters, so composing makes one out of four at most.
COMPOSED = 4
NORMALIZERS = {"NFC": COMPOSED, "NFKC": COMPOSED, "NFD": 1, "NFKD": 1, "Lowercase": 1, "Prepend": 1, "ByteLevel": 1}
PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts")
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))


class TokenBound(NamedTuple):
    """What bounds a text's tokens from below.

    Attributes:
        longest: most characters of the normalized text that a token stands for.
        shrink: most characters of a text that normalization makes one of.
        skips_space: added tokens swallow the white space beside them.
    """

    longest: int
    shrink: int
    skips_space: bool

    def least_tokens(self, text: str) -> int:
        """How many tokens `text` has at least."""
        length = len("".join(text.split())) if self.skips_space else len(text)
        shrink = 1 if text.isascii() else self.shrink
        return -(-length // (shrink * self.longest))


def token_bound(backend: tokenizers.Tokenizer) -> TokenBound | None:
    """The bound of this tokenizer; None if there is none."""
    shrink = _shrink_of(_steps(backend.normalizer, "normalizers"))
    steps = _steps(backend.pre_tokenizer, "pretokenizers")
    kept = all(step["type"] in PRE_TOKENIZERS and step.get("behavior") != "Removed" for step in steps)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    in_bytes = any(step["type"] == "ByteLevel" for step in (*steps, *_steps(backend.normalizer, "normalizers")))
    if not shrink or not kept or backend.truncation is not None or not _keeps_all(backend.model, vocabulary, in_bytes):
        return None
    added = backend.get_added_tokens_decoder().values()
    lengths = [len(_normalized(backend, token.content)) for token in added if token.normalized]
    skips_space = any(token.lstrip or token.rstrip for token in added)
    return TokenBound(max(*map(len, vocabulary), 1, *lengths), shrink, skips_space)


def _normalized(backend: tokenizers.Tokenizer, text: str) -> str:
    return text if backend.normalizer is None else backend.normalizer.normalize_str(text)


def _steps(part: Any, of_sequence: str) -> list[Mapping[str, Any]]:
    """Settings of a normalizer or pre-tokenizer; of a sequence, those of its parts."""
    return [] if part is None else _flat(json.loads(part.__getstate__()), of_sequence)


def _flat(part: Mapping[str, Any], of_sequence: str) -> list[Mapping[str, Any]]:
    if part["type"] != "Sequence":
        return [part]
    return [step for inner in part[of_sequence] for step in _flat(inner, of_sequence)]


def _shrink_of(normalizers: Iterable[Mapping[str, Any]]) -> int:
    """Most characters of which these normalizers make one, of ASCII 1; 0: any number, perhaps to drop them."""
    shrink, replaced = 1, False
    for step in normalizers:
        if step["type"] == "Replace":
            old = step["pattern"].get("String")
            shrink *= 1 if old and len(step["content"]) >= len(old) else 0
            replaced = True
        else:
            shrink *= NORMALIZERS.get(step["type"], 0)
            if replaced and NORMALIZERS.get(step["type"]) == COMPOSED:
                return 0  # ASCII may have become what is composed
    return shrink


def _keeps_all(model: tokenizers.models.Model, vocabulary: Mapping[str, int], in_bytes: bool) -> bool:
    """Whether each character becomes a token or part of one, and no token stands for a run of unknown ones."""
    if not isinstance(model, tokenizers.models.BPE) or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if in_bytes and all(character in vocabulary for character in tokenizers.pre_tokenizers.ByteLevel.alphabet()):
        return True
    if model.byte_fallback and all(token in vocabulary for token in BYTE_TOKENS):
        return True
    return model.unk_token is not None and not model.fuse_unk
