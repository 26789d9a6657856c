"""Which tokens a step may sample for requests with structured outputs: a bit for each token of the vocabulary."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from fineserve_jax.request.request import Request, RequestStatus
from fineserve_jax.request.structured.matcher import DEAD_END, fill_bitmask

WORD_BITS = 32
ALL = -1  # as i32: every bit is set


class TokenMasks(NamedTuple):
    """What the requests of a step may sample.

    Attributes:
        allowed: u32[rows, words], bit i of word w for token 32 w + i; all bits of rows that may sample anything.
        stuck: the requests that can sample nothing, each with the reason; their rows have all bits set.
    """

    allowed: np.ndarray
    stuck: dict[Request, str]


def build_masks(
    requests: Sequence[Request], rows: int, vocab_size: int, eos_ids: Iterable[int], always: bool = False
) -> TokenMasks | None:
    """The masks of the requests to be sampled, in their order, padded to `rows`; None if all may sample anything.

    The end of the text is a stop token's affair like any other's: it can be sampled where the text is complete, behind
    the first `min_tokens` tokens, and not if it is to be ignored. But where nothing else can be sampled, it can be.

    Args:
        eos_ids: the model's end-of-sequence tokens.
        always: also where all may sample anything.
    """
    # Of one that has ended meanwhile, what is sampled counts no more.
    matchers = [None if request.status is RequestStatus.FINISHED else request.matcher for request in requests]
    if not always and not any(matcher is not None for matcher in matchers):
        return None
    words = -(-(vocab_size + 1) // WORD_BITS)  # the end of the text is a token behind the others
    masks = np.full((rows, words), ALL, np.int32)
    fill_bitmask(matchers, masks)
    allowed, stuck = masks.view(np.uint32), dict[Request, str]()
    for row, request, matcher in zip(allowed, requests, matchers, strict=False):  # padding rows follow
        if matcher is not None and (reason := _settle_end(row, request, vocab_size, eos_ids)) is not None:
            stuck[request] = reason
            row[:] = np.uint32(0xFFFFFFFF)
    return TokenMasks(allowed[:, : -(-vocab_size // WORD_BITS)], stuck)


def _settle_end(row: np.ndarray, request: Request, end: int, eos_ids: Iterable[int]) -> str | None:
    """Puts the model's tokens in the place of the token for the end of the text; returns why nothing is left, if so."""
    matcher, sampling = request.matcher, request.sampling
    assert matcher is not None
    if matcher.error is not None:
        return matcher.error
    may_end = _has(row, end)
    _clear(row, [end])
    if may_end and not row.any():
        matcher.is_complete = True
        _set(row, eos_ids)
    elif request.num_output_tokens < sampling.min_tokens:
        without = row.copy()
        _clear(without, request.stop_ids)
        row[:] = without if without.any() else row
    elif may_end and not sampling.ignore_eos:
        _set(row, eos_ids)
    if not row.any():
        return DEAD_END
    _clear(row, [token for token, bias in sampling.logit_bias.items() if bias == -np.inf])
    return None if row.any() else "logit_bias bans all tokens that may follow"


def _has(row: np.ndarray, token: int) -> bool:
    return bool(row[token // WORD_BITS] >> np.uint32(token % WORD_BITS) & np.uint32(1))


def _set(row: np.ndarray, tokens: Iterable[int]) -> None:
    for token in tokens:
        row[token // WORD_BITS] |= np.uint32(1 << token % WORD_BITS)


def _clear(row: np.ndarray, tokens: Iterable[int]) -> None:
    for token in tokens:
        row[token // WORD_BITS] &= np.uint32(0xFFFFFFFF ^ (1 << token % WORD_BITS))
