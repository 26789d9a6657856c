"""Schemas, what is valid by them, and texts drawn at random from what a grammar allows."""

import datetime
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from fineserve_jax.request.structured.matcher import TokenMatcher, fill_bitmask
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.request.structured.vocabulary import Vocabulary

SCHEMAS: dict[str, Any] = {
    row["name"]: row["schema"]
    for row in map(json.loads, (Path(__file__).parent / "schemas.jsonl").read_text(encoding="utf-8").splitlines())
}
SPECIAL = 256
TOKENS = [*(bytes([i]) for i in range(256)), b"", b'{"', b'": ', b'",', b" \n", "é".encode(), "語".encode(), b"true"]
VOCABULARY = Vocabulary(TOKENS, [SPECIAL], lambda text: list(text.encode()))
CLOSING = [token for token, text in enumerate(TOKENS) if text[:1] in (b'"', b"]", b"}", b",")]

FORMATS = jsonschema.FormatChecker(["ipv4", "ipv6", "uuid", "email", "date"])


@FORMATS.checks("date", ValueError)
def _is_date(value: object) -> bool:
    """By its shape: any year may have a 29th of February."""
    return not isinstance(value, str) or bool(datetime.date.fromisoformat("2000" + value[4:]))


def validator(schema: Any) -> jsonschema.protocols.Validator:
    """By the draft that the schema names, or the latest."""
    return jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)(schema, format_checker=FORMATS)


def allowed(matcher: TokenMatcher) -> list[int]:
    """The tokens that may follow; the last one may be `VOCABULARY.end`."""
    bitmask = np.zeros((1, matcher.end // 32 + 1), np.int32)
    fill_bitmask([matcher], bitmask)
    return np.flatnonzero(np.unpackbits(bitmask.view(np.uint8), bitorder="little")).tolist()


def draw_text(params: StructuredOutputsParams, seed: int, most: int = 600) -> str | None:
    """A text that is allowed, token by token; None if it had not ended after `most`. Closes brackets rather soon."""
    rng, matcher, text = np.random.default_rng(seed), VOCABULARY.matcher(params), b""
    for _ in range(most):
        tokens = allowed(matcher)
        assert matcher.error is None, matcher.error
        if VOCABULARY.end in tokens and (len(tokens) == 1 or rng.random() < 0.3):
            return text.decode()
        inner = [token for token in tokens if token != VOCABULARY.end]
        closing = [token for token in inner if token in CLOSING]
        token = int(rng.choice(closing if closing and rng.random() < 0.5 else inner))
        matcher.accept(token)
        text += TOKENS[token]
        if matcher.is_complete:
            return text.decode()
    return None


def allows(params: StructuredOutputsParams, text: str) -> bool:
    """Whether a text is allowed, byte by byte and to its end."""
    matcher = VOCABULARY.matcher(params)
    for byte in text.encode():
        if matcher.is_complete or byte not in allowed(matcher):
            return False
        matcher.accept(byte)
    return matcher.is_complete or VOCABULARY.end in allowed(matcher)
