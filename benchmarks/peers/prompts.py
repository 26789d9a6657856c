"""The prompts of the offline batch: a file's, as token ids through the model's chat template."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fineserve_jax.loaders import Tokenizer, encode_chat


def read_prompts(
    paths: Sequence[Path], tokenizer: Tokenizer, max_tokens: int, most: int
) -> tuple[list[list[int]], list[int]]:
    """The prompts of files of JSON objects, a line each, and how many tokens each is to be answered with.

    A row has `messages`, or its text in `prompt`, `question` or, as the first of a list, `turns`. Its `max_tokens` is
    what it is answered with, else `max_tokens` is. One with more than `most` tokens in all is left out.

    Raises:
        ValueError: a row without any of these; files without a row that fits.
    """
    prompts, lengths = [], []
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            row = json.loads(line)
            tokens, length = _encode(row, tokenizer, f"{path}:{number}"), row.get("max_tokens", max_tokens)
            if len(tokens) + length <= most:
                prompts.append(tokens)
                lengths.append(length)
    if not prompts:
        raise ValueError(f"no prompt of {', '.join(map(str, paths))} has at most {most} tokens, answer included")
    return prompts, lengths


def _encode(row: dict[str, Any], tokenizer: Tokenizer, place: str) -> list[int]:
    if "prompt" in row:
        return tokenizer.encode(row["prompt"])
    text = row.get("question") or (row.get("turns") or [None])[0]
    messages = row.get("messages") or ([{"role": "user", "content": text}] if text else None)
    if messages is None:
        raise ValueError(f"{place} has no messages, prompt, question or turns")
    return encode_chat(tokenizer, messages)[1]
