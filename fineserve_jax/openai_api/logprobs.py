"""Log-probabilities of tokens as they are told: plainly, and in the forms of OpenAI's endpoints."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from fineserve_jax.loaders import Tokenizer
from fineserve_jax.runner.runner import TokenLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, as in OpenAI's API, whose log-probabilities are never null."""

Entries = list[dict[str, Any]]
"""For each token {"token", "text", "bytes", "logprob"}, with "top", a list of such, for the most likely tokens."""


def logprob_entries(
    tokenizer: Tokenizer, token_ids: Iterable[int], logprobs: Sequence[TokenLogprobs] | None
) -> Entries | None:
    """Log-probabilities of a sample's tokens, as plain answers have them; None if none were asked for."""
    if logprobs is None:
        return None
    return [_entry(tokenizer, token, entry) for token, entry in zip(token_ids, logprobs, strict=True)]


def _entry(tokenizer: Tokenizer, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token,
            "text": tokenizer.decode([token], skip_special_tokens=False),
            "bytes": list(tokenizer.token_bytes(token)),
            "logprob": logprob if math.isfinite(logprob) else None,
        }

    top = [named(other, logprob) for other, logprob in entry.top.items()]
    return named(token, entry.logprob) | ({"top": top} if top else {})


def chat_logprobs(entries: Entries) -> dict[str, Any]:
    """As a chat completion tells them."""
    return {"content": [_chat_entry(entry) for entry in entries], "refusal": None}


def _chat_entry(entry: dict[str, Any]) -> dict[str, Any]:
    return _token(entry) | {"top_logprobs": [_token(other) for other in entry.get("top", ())]}


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["text"], "logprob": _logprob(entry), "bytes": entry["bytes"]}


def _logprob(entry: dict[str, Any]) -> float:
    return MIN_LOGPROB if entry["logprob"] is None else entry["logprob"]


def text_logprobs(entries: Entries, offset: int = 0) -> dict[str, Any]:
    """As a completion tells them. `offset`: characters of the tokens before."""
    texts = [entry["text"] for entry in entries]
    starts = [offset]
    for text in texts:
        starts.append(starts[-1] + len(text))
    return {
        "tokens": texts,
        "token_logprobs": [_logprob(entry) for entry in entries],
        "top_logprobs": [{other["text"]: _logprob(other) for other in entry.get("top", ())} for entry in entries],
        "text_offset": starts[:-1],
    }
