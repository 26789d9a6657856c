"""The forms in which callers give prompts: texts, token ids, tables of either; one, or several."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fineserve_jax.engine.checks import token_list
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.validation import shown

TABLE_KEYS = ("prompt", "prompt_token_ids")


def prompt_list(prompts: Any) -> list[Any]:
    """The prompts, of which each may be of any form that `encode_prompt` takes.

    Args:
        prompts: a single one, or several in a list, a generator, or an array with a row for each.

    Raises:
        RequestError: neither of these.
    """
    return one_or_several(prompts)[0]


def one_or_several(prompts: Any) -> tuple[list[Any], bool]:
    """The prompts, see `prompt_list`, and whether a single one was given."""
    if isinstance(prompts, str | Mapping):
        return [prompts], True
    plain = _plain(prompts)
    if isinstance(plain, bytes | bytearray | set | frozenset) or not isinstance(plain, Iterable):
        raise RequestError(f"prompts is a {type(plain).__name__}; give text, a list of token ids, or a list of these")
    if isinstance(plain, str):
        return [plain], True
    listed = list(plain)
    # Whatever its numbers are, a list of numbers is one prompt: it is refused for its numbers, if at all.
    return ([listed], True) if listed and _is_number(listed[0]) else (listed, False)


def conversation_list(conversations: Iterable[Any]) -> list[Any]:
    """The conversations: a single one, that is messages, or several."""
    if isinstance(conversations, str | Mapping) or not isinstance(conversations, Iterable):
        return [conversations]
    listed = list(conversations)
    return [listed] if listed and isinstance(listed[0], Mapping) else listed


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages."""
    return (
        isinstance(prompt, Sequence) and not isinstance(prompt, str) and isinstance(next(iter(prompt), None), Mapping)
    )


def encode_prompt(tokenizer: Tokenizer, prompt: Any, max_tokens: int | None = None) -> tuple[str | None, list[int]]:
    """The prompt's text, None if it has none, and its token ids.

    Args:
        prompt: text; token ids in a list, a generator, or an array; or a table as vLLM takes it, of text as
            {"prompt": ...}, or of token ids as {"prompt_token_ids": ...}, perhaps with the text they came from.
        max_tokens: see `Tokenizer.encode`.

    Raises:
        RequestError: anything else, an empty text, or one that is certain to have more tokens.
    """
    if isinstance(prompt, Mapping):
        text, token_ids = _of_table(prompt)
    else:
        text, token_ids = (prompt, None) if isinstance(prompt, str) else (None, prompt)
    if text is not None and token_ids is None:
        return text, tokenizer.encode_prompt(text, max_tokens)
    return text, token_list(token_ids)


def _of_table(table: Mapping[str, Any]) -> tuple[str | None, Any]:
    """The text and the token ids of a table, which has at least one of them."""
    given = {name: value for name, value in table.items() if value is not None}
    if not given or (unknown := [name for name in given if name not in TABLE_KEYS]):
        wrong = f"the key {shown(unknown[0])}" if given else "neither text nor token ids"
        raise RequestError(f"the prompt is a table with {wrong}; give {' or '.join(TABLE_KEYS)}")
    text = given.get("prompt")
    if text is not None and not isinstance(text, str):
        raise RequestError(f"prompt in the prompt's table is a {type(text).__name__}; give text, or prompt_token_ids")
    return text, given.get("prompt_token_ids")


def _plain(prompts: Any) -> Any:
    return np.asarray(prompts).tolist() if hasattr(prompts, "__array__") else prompts


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex | np.generic) and not isinstance(value, str)
