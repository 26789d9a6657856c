"""Rows of a file of prompts: read one by one, checked, and turned into what the engine takes."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fineserve_jax.engine.request_checks import is_latency_target
from fineserve_jax.loaders import Tokenizer, encode_chat
from fineserve_jax.sampling_params import SamplingParams

TARGETS = ("ttft_slo_s", "tpot_slo_s")
ROW_FIELDS = (
    "id",
    "prompt",
    "messages",
    "model",
    "kv_precision",
    "min_kv_precision",
    "tenant",
    *TARGETS,
    "drop_when_late",
)
EXAMPLES = {"model": "smollm2-135m", "kv_precision": "int8", "min_kv_precision": "int4", "tenant": "alice"}
RowId = str | int


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it was written, its shape checked.

    Attributes:
        line: where it stands, from 1 on.
        id: its own, or the line.
        prompt: text or token ids; None if there are messages.
        messages: a conversation; None if there is a prompt.
        model: name of the model; None for the only one.
        kv_precision: KV format or "auto"; None for the model's own.
        min_kv_precision: KV format its older tokens may be narrowed to; None for the engine's.
        tenant: whose it is; empty for nobody's in particular.
        ttft_slo_s, tpot_slo_s: latency targets in seconds, see `Request`; None for none.
        drop_when_late: whether it ends, unanswered, when its first token cannot be in time any more.
        sampling: the sampling fields it sets, unchecked.
    """

    line: int
    id: RowId
    prompt: str | list[int] | None
    messages: list[Any] | None
    model: str | None
    kv_precision: str | None
    min_kv_precision: str | None
    tenant: str
    ttft_slo_s: float | None
    tpot_slo_s: float | None
    drop_when_late: bool
    sampling: dict[str, Any]


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be answered, and why. `id` is the line where the row has no usable one."""

    line: int
    id: RowId
    error: str


def read_rows(lines: Iterable[bytes]) -> Iterator[Row | BadRow]:
    """The rows of JSON lines; empty lines are passed over but count."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield parse_row(line, number)


def parse_row(line: bytes, number: int) -> Row | BadRow:
    """One line as a row; never raises for what the line holds."""
    try:
        content = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return BadRow(number, number, f"line {number} is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        return BadRow(number, number, f"line {number} is not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow(number, number, f"line {number} holds a JSON {_kind(content)}, not an object with a prompt")
    row_id = content.get("id")
    if row_id is None:
        row_id = number
    elif isinstance(row_id, bool) or not isinstance(row_id, RowId):
        return BadRow(number, number, f"id is a JSON {_kind(row_id)}; give text or a whole number, or none")
    if wrong := _what_is_wrong(content):
        return BadRow(number, row_id, wrong)
    return Row(
        line=number,
        id=row_id,
        prompt=content.get("prompt"),
        messages=content.get("messages"),
        model=content.get("model"),
        kv_precision=content.get("kv_precision"),
        min_kv_precision=content.get("min_kv_precision"),
        tenant=content.get("tenant") or "",
        ttft_slo_s=content.get("ttft_slo_s"),
        tpot_slo_s=content.get("tpot_slo_s"),
        drop_when_late=content.get("drop_when_late") or False,
        sampling={name: value for name, value in content.items() if name not in ROW_FIELDS},
    )


def prompt_tokens(row: Row, tokenizer: Tokenizer) -> list[int]:
    """The row's prompt as token ids. Raises `RequestError`."""
    if row.messages is not None:
        _, token_ids = encode_chat(tokenizer, row.messages)
        return token_ids
    if isinstance(row.prompt, str):
        return tokenizer.encode_prompt(row.prompt)
    return list(row.prompt or ())


def row_sampling(row: Row, defaults: Mapping[str, Any]) -> SamplingParams:
    """How to sample the row: its own fields over `defaults`. Raises `RequestError`."""
    return SamplingParams(**{**defaults, **row.sampling})


def _what_is_wrong(content: dict[str, Any]) -> str | None:
    known = (*ROW_FIELDS, *SamplingParams.model_fields)
    if unknown := [name for name in content if name not in known]:
        return f"unknown field {', '.join(map(repr, unknown))}; a row may have: {', '.join(known)}"
    prompt, messages = content.get("prompt"), content.get("messages")
    if (prompt is None) == (messages is None):
        have = "neither prompt nor messages" if prompt is None else "both prompt and messages"
        return f"the row has {have}; give one of them"
    if messages is None and not isinstance(prompt, str) and not _is_token_list(prompt):
        return f"prompt is a JSON {_kind(prompt)}; give text, or a list of token ids"
    if messages is not None and not isinstance(messages, list):
        return f"messages is a JSON {_kind(messages)}; give a list of objects with role and content"
    for name, example in EXAMPLES.items():
        value = content.get(name)
        if value is not None and not isinstance(value, str):
            return f'{name}={value!r} is a JSON {_kind(value)}; give text such as "{example}"'
    for name in TARGETS:
        target = content.get(name)
        if target is not None and not (_is_number(target) and is_latency_target(target)):
            return f"{name}={_shown(target)} is no latency target; give seconds, more than 0, or none"
    if not isinstance(content.get("drop_when_late"), bool | None):
        return f"drop_when_late={content['drop_when_late']!r} is neither true nor false; give one of them, or none"
    return None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _shown(value: Any) -> str:
    return repr(value) if _is_number(value) else f"a JSON {_kind(value)}"


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", dict: "object"}
    return names.get(type(value), "list of more than whole numbers" if value else "list")
