"""What is allowed by a JSON schema is valid by it, and nothing that is valid in its usual spelling is forbidden."""

import json

import jsonschema
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from schema_cases import SCHEMAS, allows, draw_text, validator

from fineserve_jax.errors import RequestError
from fineserve_jax.request.structured.params import StructuredOutputsParams


def refused(schema) -> str:
    with pytest.raises(RequestError) as error:
        StructuredOutputsParams(json=schema)
    return str(error.value)


@pytest.mark.parametrize("name", SCHEMAS)
def test_texts_that_are_allowed_are_valid(name):
    params = StructuredOutputsParams(json=SCHEMAS[name])
    texts = [draw_text(params, seed) for seed in range(5)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 4
    for text in ended:
        validator(SCHEMAS[name]).validate(json.loads(text))


NAMES = st.sampled_from(["a", "b", "ü", "a b", "x1"])
NUMBERS = st.integers(-20, 20) | st.floats(-9, 9, allow_nan=False).map(lambda x: round(x, 2))
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=["Cc"]), max_size=3)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=2),
    max_leaves=3,
)
PATTERNS = st.sampled_from(["^a+$", "b", "^[a-c]|d$", "(x|y)z", ".$", r"^\S+$", "^.{2}$", r"\d", "[^a]", "^$", r"\w1"])


def tables(fixed, **optional):
    return st.fixed_dictionaries(fixed, optional=optional)


LEAVES = st.one_of(
    tables(
        {"type": st.sampled_from(["integer", "number"])},
        minimum=NUMBERS,
        maximum=NUMBERS,
        exclusiveMinimum=NUMBERS,
        exclusiveMaximum=NUMBERS,
        multipleOf=st.sampled_from([1, 2, 3, 0.5, 0.1]),
    ),
    tables({"type": st.just("string")}, minLength=st.integers(0, 4), maxLength=st.integers(0, 6), pattern=PATTERNS),
    tables({"enum": st.lists(VALUES, min_size=1, max_size=3)}),
    tables({"const": VALUES}),
    st.sampled_from([{"type": "boolean"}, {"type": ["integer", "null", "string"], "maximum": 3, "maxLength": 2}, True]),
)


def larger(inner):
    objects = tables(
        {"type": st.just("object")},
        properties=st.dictionaries(NAMES, inner, max_size=3),
        required=st.lists(st.sampled_from(["a", "b", "z"]), unique=True, max_size=2),
        additionalProperties=st.booleans() | inner,
        minProperties=st.integers(0, 3),
        maxProperties=st.integers(0, 3),
        patternProperties=st.dictionaries(st.sampled_from(["^x", "[0-9]$"]), inner, max_size=2),
    )
    arrays = tables(
        {},
        type=st.just("array"),
        items=inner,
        prefixItems=st.lists(inner, min_size=1, max_size=2),
        minItems=st.integers(0, 3),
        maxItems=st.integers(0, 4),
    )
    kinds, several = st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(inner, min_size=1, max_size=3)
    combined = st.builds(lambda kind, parts: {kind: parts}, kinds, several)
    beside = st.builds(lambda one, other: {**(one if isinstance(one, dict) else {}), **other}, inner, combined)
    return objects | arrays | combined | beside


@settings(max_examples=150)
@given(schema=st.recursive(LEAVES, larger, max_leaves=6), seed=st.integers(0, 2**32 - 1))
def test_whatever_is_not_refused_is_kept_to(schema, seed):
    try:
        params = StructuredOutputsParams(json=schema)
    except RequestError:
        assume(False)
    text = draw_text(params, seed, most=200)
    if text is not None:
        validator(schema).validate(json.loads(text))


@settings(max_examples=60)
@given(value=VALUES)
def test_a_constant_allows_itself_and_nothing_else(value):
    params, usual = StructuredOutputsParams(json={"const": value}), json.dumps(value, ensure_ascii=False)
    assert json.loads(draw_text(params, 0)) == value
    assert "." in usual or allows(params, usual)  # 0.0 is written as 0


@pytest.mark.parametrize(
    ("low", "high"), [(2, 2.58), (2, 5), (0, 0.5), (-2, -1.5), (-2.5, -2), (0.1, 1), (3, 3.0001), (2**20, 2**20 + 0.5)]
)
def test_exclusive_bounds_are_excluded(low, high):
    params = StructuredOutputsParams(json={"type": "number", "exclusiveMinimum": low, "exclusiveMaximum": high})
    for number in (low, high, float(low), float(high)):
        assert not allows(params, repr(number))
    assert allows(params, repr((low + high) / 2))
    draft4 = {"type": "number", "minimum": low, "exclusiveMinimum": True, "maximum": high, "exclusiveMaximum": True}
    assert not any(allows(StructuredOutputsParams(json=draft4), repr(number)) for number in (low, high))


def test_a_property_does_not_come_again_in_another_spelling():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    params = StructuredOutputsParams(json=schema)
    assert allows(params, '{"a": 1, "b": "x\\n"}')
    assert not allows(params, r'{"\u0061": "x"}')


# -- whitespace ------------------------------------------------------------------------------------------------


def test_whitespace_between_tokens_has_an_end():
    params = StructuredOutputsParams(json={"type": "object", "properties": {"a": True}, "required": ["a"]})
    assert allows(params, '{"a":[1,2]}')
    assert allows(params, json.dumps({"a": [1, {"b": 2}]}, indent=4))
    assert not allows(params, '{  "a":1}')
    assert not allows(params, ' {"a":1}')
    assert not allows(params, '{"a":1}\n')


def test_whitespace_may_be_excluded_or_chosen():
    schema = {"type": "array", "items": {"type": "integer"}}
    compact = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    assert (allows(compact, "[1,2]"), allows(compact, "[1, 2]")) == (True, False)
    tabs = StructuredOutputsParams(json=schema, whitespace_pattern=r"\t{2}")
    assert (allows(tabs, "[1,\t\t2]"), allows(tabs, "[1,2]"), allows(tabs, "[1, 2]")) == (True, True, False)


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"uniqueItems": True, "type": "array"}, "#/uniqueItems", '"uniqueItems" is not supported'),
        ({"properties": {"a": {"items": {"not": {}}}}}, "#/properties/a/items/not", '"not" is not supported'),
        ({"if": {}, "then": {}}, "#/if", '"if", "then" is not supported'),
        ({"items": {"type": "string", "format": "iban"}}, "#/items/format", "Unknown format: iban"),
        ({"properties": {"a/b": {"pattern": "(?=x)"}}}, "#/properties/a~1b/pattern", "look-ahead"),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"contains": {}}}}, "#/$defs/x/contains", "not supported"),
        ({"anyOf": [{}, {"$ref": "#/$defs/none"}]}, "#/anyOf/1/$ref", "'/$defs/none' does not exist"),
        ({"items": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "#/items/oneOf", "use anyOf"),
        ({"prefixItems": [True, {"type": "integre"}]}, "#/prefixItems/1/type", "Invalid type: integre"),
        ({"type": "object", "minProperties": 2}, "#/minProperties", "2 properties of which 0 are required"),
        ({"x-guidance": {"lenient": True}, "dependentRequired": {}}, "#/dependentRequired", "not supported"),
    ],
)
def test_what_is_not_supported_is_named_with_its_place(schema, place, reason):
    message = refused(schema)
    assert f"the JSON schema cannot be kept to at {place}: " in message
    assert reason in message
    assert "Traceback" not in message


@pytest.mark.parametrize(
    "schema", [False, 5, "{", [1], {"a": float("nan")}, {"enum": []}, {"a": object()}, "x" * 10**6]
)
def test_what_is_no_schema_or_allows_nothing_is_refused(schema):
    assert len(refused(schema)) < 1000


def test_a_deep_schema_or_one_too_large_is_refused():
    deep = "[" * 100_000
    assert "no JSON schema" in refused(deep)
    nested = {}
    for _ in range(500):
        nested = {"items": nested}
    assert "recursion limit" in refused(nested)
    assert "more than 1048576 characters" in refused({"enum": ["x" * 1000] * 1100})


def test_a_fault_in_a_large_schema_is_told_in_time():
    schema = {"properties": {f"p{i}": {"type": "object", "properties": {"a": {"type": "string"}}} for i in range(2000)}}
    schema["properties"]["p1999"]["not"] = {}
    assert 'at #: "not" is not supported' in refused(schema)


def test_schemas_in_the_file_are_schemas():
    for schema in SCHEMAS.values():
        jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator).check_schema(schema)
    assert len(SCHEMAS) == 100
