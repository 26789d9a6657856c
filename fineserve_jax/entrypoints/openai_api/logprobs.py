"""Log-probabilities of tokens as they are told: plainly, and in the forms of OpenAI's endpoints."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.runner.results import TokenLogprobs

MIN_LOGPROB = -9999.0
"""Stands for minus infinity, as in OpenAI's API, whose log-probabilities are never null."""

Entries = list[dict[str, Any]]
"""For each token {"token", "text", "bytes", "logprob"}, with "top", a list of such, for the most likely tokens, and
"asked" for those that were asked for."""
UNKNOWN = TokenLogprobs(-math.inf, {})
"""Told of the first token of a prompt."""


class Echo(NamedTuple):
    """What is told of a prompt.

    Attributes:
        text: its text, where answers begin with it.
        entries: log-probabilities of its tokens, where the first has none; None: none were asked for.
        is_wanted: whether answers begin with it.
    """

    text: str
    entries: Entries | None
    is_wanted: bool


def echo_of(output: RequestOutput, prompt: str | None, tokenizer: Tokenizer, is_wanted: bool) -> Echo:
    """What is told of an output's prompt. `prompt`: its text, if it has one."""
    text = ""
    if is_wanted:
        ids = output.prompt_token_ids
        text = tokenizer.decode(ids, skip_special_tokens=False) if prompt is None else prompt
    if output.prompt_logprobs is None:
        return Echo(text, None, is_wanted)
    tokens = zip(output.prompt_token_ids, output.prompt_logprobs, strict=False)
    return Echo(text, [_entry(tokenizer, token, entry or UNKNOWN) for token, entry in tokens], is_wanted)


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

    lists = {"top": entry.top, "asked": entry.asked}
    return named(token, entry.logprob) | {
        name: [named(other, logprob) for other, logprob in table.items()] for name, table in lists.items() if table
    }


def chat_logprobs(entries: Entries) -> dict[str, Any]:
    """As a chat completion tells them."""
    return {"content": [_chat_entry(entry) for entry in entries], "refusal": None}


def _chat_entry(entry: dict[str, Any]) -> dict[str, Any]:
    asked = [_token(other) for other in entry.get("asked", ())]
    top = [_token(other) for other in entry.get("top", ())]
    return _token(entry) | {"top_logprobs": top} | ({"asked_logprobs": asked} if asked else {})


def _token(entry: dict[str, Any]) -> dict[str, Any]:
    return {"token": entry["text"], "logprob": _logprob(entry), "bytes": entry["bytes"]}


def _logprob(entry: dict[str, Any]) -> float:
    return MIN_LOGPROB if entry["logprob"] is None else entry["logprob"]


def text_logprobs(entries: Entries | None, echo: Echo, offset: int = 0) -> dict[str, Any] | None:
    """As a completion tells them: of the tokens of the answer, and before them of the prompt where it is echoed; None:
    none were asked for. `offset`: characters of what was told before."""
    of_prompt = (echo.entries or []) if echo.is_wanted else []
    if entries is None and not of_prompt:
        return None
    # A token that was put before the prompt's text has no place in it.
    shift = max(0, sum(len(entry["text"]) for entry in of_prompt) - len(echo.text)) if of_prompt else 0
    every = [*of_prompt, *(entries or [])]
    starts = [offset - shift]
    for entry in every:
        starts.append(starts[-1] + len(entry["text"]))
    logprobs: list[float | None] = [_logprob(entry) for entry in every]
    tops: list[dict[str, float] | None] = [_by_text(entry, "top") for entry in every]
    if of_prompt:
        logprobs[0] = tops[0] = None
    told = {
        "tokens": [entry["text"] for entry in every],
        "token_logprobs": logprobs,
        "top_logprobs": tops,
        "text_offset": [max(0, start) for start in starts[:-1]],
    }
    if any("asked" in entry for entry in every):
        told["asked_logprobs"] = [_by_text(entry, "asked") for entry in every]
    return told


def _by_text(entry: dict[str, Any], name: str) -> dict[str, float]:
    return {other["text"]: _logprob(other) for other in entry.get(name, ())}
