"""What a request says of its answer's form."""

import functools
import json
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from llguidance import GrammarFormat, LLMatcher, grammar_from
from pydantic import BaseModel, Field, PrivateAttr, field_validator, model_validator

from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.request.structured.exact_schema import make_exact
from fineserve_jax.request.structured.schema_faults import find_fault
from fineserve_jax.validation import Validated, given_values, refusal, shortened

KINDS = ("json", "regex", "choice", "grammar", "json_object")
MAX_CHARACTERS = 1 << 20
OPTIONS = {"coerce_one_of": False, "lenient": False, "json_allowed_escapes": 'nrbtf\\"'}
"""Of llguidance, whatever a schema itself says under "x-guidance": no keyword is passed over, and no text is written in
two ways, lest a property come again in another spelling of its name (\\u0061 for a)."""
WHITESPACE = r"( |\n[ \t]{0,32})"
"""Between the tokens of JSON if nothing else is said. Any number of blanks would let a model write blanks for ever."""
JSON_OPTIONS = OPTIONS | {"whitespace_flexible": True, "whitespace_pattern": WHITESPACE}
"""Of llguidance, for a schema of which nothing else is said."""


class StructuredOutputsParams(Validated):
    """What an answer's text must be, in one of five ways. A bad or unsupported one raises `RequestError`.

    The text is so from its first character to its last, unless `max_tokens`, the engine's `max_seq_len`, a stop token
    or a stop string ends it before: `finish_reason` is "length" in the first two cases. An end-of-sequence token can
    be sampled only where the text is complete, and the request ends where nothing may follow, before `min_tokens` if
    need be.

    Attributes:
        json: JSON schema, as a dict, a bool, text, or a class of pydantic's. Properties are written in the schema's
            order. `format` is enforced by its shape: any year may have a 29th of February. Keywords that cannot be
            kept to are refused, naming their place in the schema.
        regex: regular expression that the whole text matches, in Rust's syntax: no look-around, no back-references.
        choice: texts, of which the answer is one.
        grammar: context-free grammar, in llguidance's variant of Lark, or as llama.cpp has them (GBNF).
        json_object: any JSON object.
        disable_any_whitespace: JSON without whitespace between its tokens.
        whitespace_pattern: regular expression for whitespace between the tokens of JSON; None: nothing, a space, or a
            line break and up to 32 blanks.
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    json_schema: str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None
    _compiled: str = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _none_is_unset(cls, values: Any) -> Any:
        return given_values(values, (*cls.model_fields, "json")) if isinstance(values, Mapping) else values

    @field_validator("json_schema", mode="before")
    @classmethod
    def _schema_as_text(cls, value: Any) -> str:
        if isinstance(value, type) and issubclass(value, BaseModel):
            value = value.model_json_schema()
        try:
            text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            schema = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:  # ValueError: also text that is no JSON
            raise refusal(f"json is no JSON schema: {shortened(str(error))}; give an object") from None
        if schema is True:
            return "{}"
        if not isinstance(schema, dict):
            raise refusal(f"json={shortened(text)} is no JSON schema that anything satisfies; give an object")
        return text

    @field_validator("choice")
    @classmethod
    def _some_choice(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise ValueError("there is nothing to choose from; give at least one text")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [kind for kind in KINDS if self._value(kind) not in (None, False)]
        if len(given) != 1:
            raise refusal(
                f"structured_outputs has {' and '.join(given) if given else 'none of ' + ', '.join(KINDS)}; "
                "give exactly one of them"
            )
        if given[0] not in ("json", "json_object") and (self.disable_any_whitespace or self.whitespace_pattern):
            raise refusal(f"whitespace is chosen for JSON only, and structured_outputs has {given[0]}; leave it out")
        if self.disable_any_whitespace and self.whitespace_pattern is not None:
            raise refusal("disable_any_whitespace leaves no place for a whitespace_pattern; give one of them")
        self._compiled = self._compile(given[0])
        return self

    @property
    def text(self) -> str:
        """The grammar in llguidance's own form: equal for equal grammars."""
        return self._compiled

    def _value(self, kind: str) -> Any:
        return self.json_schema if kind == "json" else getattr(self, kind)

    def _compile(self, kind: str) -> str:
        """Checks it as far as it can be without a vocabulary."""
        value = self._value(kind)
        if len(value if isinstance(value, str) else "".join(self.choice or ())) > MAX_CHARACTERS:
            raise refusal(f"{kind} has more than {MAX_CHARACTERS} characters; give a shorter one")
        if kind in ("json", "json_object"):
            return self._compile_schema(value if kind == "json" else '{"type": "object"}')
        try:
            text = grammar_from(cast(GrammarFormat, kind), json.dumps(value) if kind == "choice" else value)
        except ValueError as error:
            raise refusal(f"{kind}={shortened(repr(value))}: {error}") from None
        if (wrong := grammar_error(text)) is not None:
            raise refusal(f"{kind}={shortened(repr(value))} cannot be kept to: {wrong}")
        return text

    def _compile_schema(self, schema: str) -> str:
        options = OPTIONS | {
            "whitespace_flexible": not self.disable_any_whitespace,
            "whitespace_pattern": None if self.disable_any_whitespace else self.whitespace_pattern or WHITESPACE,
        }
        if (error := grammar_error(_compiled("{}", options))) is not None:
            raise refusal(f"whitespace_pattern={shortened(repr(self.whitespace_pattern))}: {error}")
        try:
            return _compiled(json.dumps(exact_schema(schema, options)), options)
        except RequestError as error:
            raise refusal(str(error)) from None


def exact_schema(schema: str, options: Mapping[str, Any] = JSON_OPTIONS) -> dict[str, Any]:
    """A JSON schema in the form in which llguidance keeps to it.

    Args:
        schema: an object, as text.
        options: of llguidance.

    Raises:
        RequestError: what cannot be kept to, naming its place in the schema.
    """
    exact: dict[str, Any] = json.loads(schema)
    fault = make_exact(exact)
    if fault is None and (error := grammar_error(_compiled(json.dumps(exact), options))) is not None:
        place, what = find_fault(exact, error, lambda part: grammar_error(_compiled(json.dumps(part), options)))
        fault = f"{place}: {what}"
    if fault is not None:
        raise RequestError(f"the JSON schema cannot be kept to at {fault}; leave that out, or say it otherwise")
    return exact


def _compiled(schema: str, options: Any) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)


@functools.lru_cache(maxsize=256)  # many rows of a file ask for the same
def grammar_error(text: str) -> str | None:
    """What llguidance has against a grammar, on a line; None: nothing."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(text)
    return shortened(" ".join(messages[0].split())) if is_error else None
