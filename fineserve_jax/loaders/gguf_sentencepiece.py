"""SentencePiece vocabularies (`tokenizer.ggml.model` "llama") as BPE: pieces with scores become merges with ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, normalizers
from tokenizers.models import BPE

USER_DEFINED = 4  # a value of tokenizer.ggml.token_type
SPACE = "▁"


def sentencepiece_backend(meta: Mapping[str, Any], scores: list[float]) -> Backend:
    """The tokenizer of checked GGUF metadata that have `scores`, one for each token."""
    tokens = piece_texts(meta)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    types = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    defined = {index for index, kind in enumerate(types) if kind == USER_DEFINED}
    model = BPE(
        vocab=vocabulary,
        merges=merges_of_scores(vocabulary, scores, defined),
        byte_fallback=True,
        fuse_unk=True,
        unk_token=tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)],
    )
    backend = Backend(model)
    spell_spaces(backend, prefix=meta.get("tokenizer.ggml.add_space_prefix", True))
    return backend


def piece_texts(meta: Mapping[str, Any]) -> list[str]:
    """The tokens as they stand in normalized text: GGUF files write user-defined tokens with spaces, not with "▁"."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    types = meta.get("tokenizer.ggml.token_type")
    if types is None:
        return tokens
    taken = set(tokens)
    spelt = [token.replace(" ", SPACE) for token in tokens]
    renamed = (kind == USER_DEFINED and new not in taken for kind, new in zip(types, spelt, strict=True))
    return [new if rename else token for token, new, rename in zip(tokens, spelt, renamed, strict=True)]


def spell_spaces(backend: Backend, prefix: bool) -> None:
    """Spaces are written as "▁"; with `prefix`, what begins a text or follows a special token gets another one."""
    spaces: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    strip = []
    if prefix:
        spaces.insert(0, normalizers.Prepend(SPACE))
        strip = [decoders.Strip(" ", 1, 0)]
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def merges_of_scores(
    vocabulary: Mapping[str, int], scores: list[float], first: Collection[int]
) -> list[tuple[str, str]]:
    """The pairs that make a piece, best first.

    SentencePiece merges whichever neighbours make the piece with the best score, of equal ones the leftmost. Many
    pieces may have one score (Mistral's runs of spaces do); the pair with the longest left part goes first then, which
    extends the leftmost run as SentencePiece does. It is also the order in which transformers converts such
    vocabularies.

    first: ids of pieces that are made before all others, whatever their scores.
    """
    ranked = []
    for piece, index in vocabulary.items():
        score = float("inf") if index in first else scores[index]
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocabulary and right in vocabulary:
                ranked.append((-score, -cut, cut - len(piece), index, left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]
