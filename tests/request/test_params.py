"""What a request says of its answer's form: taken as vLLM and OpenAI have it, or refused with what is wrong."""

import json

import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_cases import TOKENS, VOCABULARY, allowed, allows, draw_text

from fineserve_jax import RequestError, SamplingParams, StructuredOutputsParams
from fineserve_jax.request.structured.vocabulary import Vocabulary

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)


class Model(pydantic.BaseModel):
    a: int


@settings(max_examples=60)
@given(choices=st.lists(TEXTS, min_size=1, max_size=5, unique=True), other=TEXTS, seed=st.integers(0, 99))
def test_an_answer_is_one_of_the_choices(choices, other, seed):
    params = StructuredOutputsParams(choice=choices)
    assert draw_text(params, seed) in choices
    assert all(allows(params, choice) for choice in choices)
    assert allows(params, other) == (other in choices)


@pytest.mark.parametrize(
    ("regex", "taken", "refused"),
    [
        ("[a-c]+", ["a", "cab"], ["", "ad", " a"]),
        ("^a$", ["a"], ["ab", "ba"]),
        ("yes|no", ["yes", "no"], ["yesno", "y"]),
        (r"[ж-ш]{2}", ["жш"], ["ab", "ж"]),
        (r"\\[[0-9]{1,3}\\]", ["[1]", "[123]"], ["[]", "[1234]"]),
        ("", [""], ["a"]),
    ],
)
def test_a_regular_expression_matches_the_whole_answer(regex, taken, refused):
    params = StructuredOutputsParams(regex=regex.replace("\\\\", "\\"))
    assert all(allows(params, text) for text in taken)
    assert not any(allows(params, text) for text in refused)


@pytest.mark.parametrize(
    "grammar",
    [
        'start: sum\nsum: term ("+" term)*\nterm: /[0-9]+/ | "(" sum ")"',
        'root ::= sum\nsum ::= term ("+" term)*\nterm ::= [0-9]+ | "(" sum ")"',
    ],
    ids=["Lark", "GBNF"],
)
def test_a_grammar_may_be_larks_or_llama_cpps(grammar):
    params = StructuredOutputsParams(grammar=grammar)
    assert all(allows(params, text) for text in ("1", "1+23", "(1+(2))+3"))
    assert not any(allows(params, text) for text in ("", "1+", "(1", "1)", "a"))


def test_any_json_object():
    params = StructuredOutputsParams(json_object=True)
    assert allows(params, '{"a": [1, {"b": null}], "c": "d"}')
    assert not allows(params, "[1]")


@pytest.mark.parametrize("given", [SCHEMA, json.dumps(SCHEMA), Model], ids=["dict", "text", "class"])
def test_a_schema_may_be_given_in_several_forms(given):
    params = StructuredOutputsParams(json=given)
    assert (allows(params, '{"a": 1}'), allows(params, '{"a": "1"}')) == (True, False)


def test_everything_goes_where_a_schema_is_true():
    params = StructuredOutputsParams(json=True)
    assert all(allows(params, text) for text in ("null", "[1]", '{"a": 1}', '"x"'))


# -- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "structured_outputs has none of json, regex, choice, grammar, json_object; give exactly one"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs has regex and choice; give exactly one"),
        ({"regex": "(a"}, r"regex='\(a' cannot be kept to: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around, including look-ahead and look-behind, is not supported"),
        ({"regex": 5}, "regex=5: input should be a valid string"),
        ({"choice": []}, "there is nothing to choose from"),
        ({"choice": "ab"}, "choice='ab'"),
        ({"grammar": "start: foo"}, "grammar='start: foo' cannot be kept to: .*unknown name"),
        ({"grammar": 'root ::= ("a"'}, "Failed to convert the grammar from GBNF"),
        ({"regex": "a" * 2**21}, "regex has more than 1048576 characters"),
        ({"schema": {}}, "unknown setting 'schema'; the settings are: choice, .* json, json_object"),
        ({"regex": "a", "whitespace_pattern": " "}, "whitespace is chosen for JSON only"),
        ({"json": {}, "whitespace_pattern": "("}, r"whitespace_pattern='\('.*unclosed group"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "leaves no place for"),
    ],
)
def test_what_cannot_be_honoured_is_refused(fields, message):
    with pytest.raises(RequestError, match=message):
        StructuredOutputsParams(**fields)
    with pytest.raises(RequestError, match=message):
        SamplingParams(structured_outputs=fields)


def test_a_text_that_no_tokens_spell_has_an_error():
    digits = Vocabulary([b"1", b"2"], [], lambda text: [])
    matcher = digits.matcher(StructuredOutputsParams(regex="[1a]+"))
    assert (allowed(matcher), matcher.error) == ([0], None)
    matcher = digits.matcher(StructuredOutputsParams(regex="[ab]"))
    allowed(matcher)
    assert matcher.error == "no token of the model continues the text"


def test_special_tokens_are_never_allowed():
    matcher = VOCABULARY.matcher(StructuredOutputsParams(regex="(?s:.*)"))
    assert [token for token, text in enumerate(TOKENS) if not text and token in allowed(matcher)] == []


# -- OpenAI's words --------------------------------------------------------------------------------------------


def openais(response_format, **fields) -> SamplingParams:
    return SamplingParams(**fields | {"response_format": response_format})


@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        ({"type": "json_object"}, {"json_object": True}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}, {"json": SCHEMA}),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, {"json": SCHEMA}),
    ],
)
def test_a_response_format_is_a_structured_output(response_format, expected):
    expected = SamplingParams(structured_outputs=expected)
    assert openais(response_format) == expected
    assert expected.structured_outputs.text == StructuredOutputsParams(**(expected_fields(response_format))).text


def expected_fields(response_format):
    table = response_format.get("json_schema")
    return {"json_object": True} if table is None else {"json": table["schema"]}


@pytest.mark.parametrize("response_format", [None, {"type": "text"}])
def test_any_text_will_do(response_format):
    assert openais(response_format) == SamplingParams()
    both = openais(response_format, structured_outputs={"regex": "a"})
    assert both.structured_outputs.regex == "a"


@pytest.mark.parametrize(
    ("response_format", "message"),
    [
        ("json", "response_format='json' is no object"),
        ({"type": "xml"}, "its type is text, json_object or json_schema"),
        ({"type": "json_schema"}, "with the last goes one other member"),
        ({"type": "json_object", "schema": {}}, "is none of the known ones"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "has no schema; give name and schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strikt": True}}, "has 'strikt'; it may have: name"),
        ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, 'at #/not: "not" is not supported'),
    ],
)
def test_a_response_format_that_is_none_is_refused(response_format, message):
    with pytest.raises(RequestError, match=message):
        openais(response_format)


def test_both_words_at_once_are_refused():
    with pytest.raises(RequestError, match="response_format and structured_outputs both say"):
        openais({"type": "json_object"}, structured_outputs={"regex": "a"})
