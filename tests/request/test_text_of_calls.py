"""Texts in which tools are called: what is allowed of them, and what is read out of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from schema_cases import allows, draw_text, validator

from fineserve_jax import RequestError
from fineserve_jax.entrypoints.openai_api.tool_calls import Call, TextBeforeCalls, calls_message, find_calls
from fineserve_jax.request.structured.tool_calls import BEGIN, form_of_calls

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}
SEARCH = {"type": "function", "function": {"name": "weather-search", "parameters": CITY}}
NAMED = {"type": "function", "function": {"name": "weather"}}
PARIS, ANY = {"city": "Paris"}, {"x": ["</tool_call>", {"y": None}]}
NAMES = ("weather", "weather-search")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
TEXTS = st.text(max_size=6) | st.sampled_from(
    ["a\n", "<tool_call", BEGIN, "</tool_call>", f'{BEGIN}\n{{"name": "no"}}']
)
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(st.text(max_size=6), JSON, max_size=3)), max_size=3)


def rendered(*calls):
    """Calls as chat templates write them."""
    bodies = [f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}' for name, arguments in calls]
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


ONE, TWO = rendered(("weather", PARIS)), rendered(("weather", PARIS), ("weather-search", ANY))


@pytest.mark.parametrize(
    ("choice", "parallel", "allowed", "refused"),
    [
        ("auto", True, ["", "Hi <tool_calls", ONE, f"Hi\n{ONE}", TWO], [f"{ONE}\n", f"{ONE} Hi", f"Hi {BEGIN}", BEGIN]),
        ("auto", False, ["Hi", ONE, f"Hi {ONE}"], [TWO]),
        ("required", True, [ONE, TWO], ["", "Hi", f"Hi {ONE}", f"\n{ONE}"]),
        ("required", False, [ONE, rendered(("weather-search", ANY))], ["", TWO]),
        (NAMED, True, [ONE], ["", TWO, rendered(("weather-search", ANY))]),
    ],
)
def test_calls_come_where_they_may_and_where_they_must(choice, parallel, allowed, refused):
    form = form_of_calls([WEATHER, SEARCH], choice, parallel)
    assert [text for text in allowed if not allows(form, text)] == []
    assert [text for text in refused if allows(form, text)] == []


def test_what_is_strict_has_arguments_of_its_schema():
    form = form_of_calls([WEATHER, SEARCH])
    bad = [{}, {"city": 1}, {"city": "a", "x": 1}, {"city": "a" * 9}, {"days": 1, "city": "a"}]
    assert [arguments for arguments in bad if allows(form, rendered(("weather", arguments)))] == []
    assert [arguments for arguments in bad if not allows(form, rendered(("weather-search", arguments)))] == []
    assert not allows(form, rendered(("other", {})))
    assert not allows(form, rendered(("weather-search", [])))
    assert allows(form_of_calls([{"function": {"name": "now", "strict": True}}]), rendered(("now", {})))


@pytest.mark.parametrize("seed", range(6))
def test_a_text_that_is_drawn_is_read_as_calls_of_the_schema(seed):
    text = draw_text(form_of_calls([WEATHER], "required"), seed)
    around, calls = find_calls(text, NAMES)
    assert (around, {call.name for call in calls}) == ("", {"weather"})
    for call in calls:
        validator(CITY).validate(json.loads(call.arguments))


def test_any_text_will_do_where_nothing_is_demanded():
    assert form_of_calls([SEARCH]) is None
    assert form_of_calls([{"type": "anything"}]) is None
    assert form_of_calls([]) is None


def strict(**function):
    return {"type": "function", "function": {"name": "f", "strict": True} | function}


@pytest.mark.parametrize(
    ("tools", "choice", "message"),
    [
        (
            [SEARCH, strict(parameters={"properties": {"a": {"not": {}}}})],
            "auto",
            r"tools\.1\.function is strict: .*/a/not",
        ),
        (
            [strict(parameters={"type": "array"})],
            "auto",
            r"tools\.0\.function\.parameters=.* is no schema of an object",
        ),
        ([strict(parameters=[])], "auto", r"tools\.0\.function\.parameters=\[\] is no schema of an object"),
        ([strict(name="a b")], "auto", r"tools\.0\.function\.name='a b' is no name of a function"),
        ([{}], "required", r"tools\.0\.function\.name=None is no name of a function"),
        ([WEATHER, WEATHER], "auto", "tools has two functions 'weather'"),
        ([], "required", "tool_choice='required' without tools cannot be kept to; give tools"),
        ([WEATHER], {"type": "function", "function": {"name": "x"}}, "tool_choice names 'x', which is none of the"),
        ([WEATHER], {"type": "allowed_tools"}, r"tool_choice=\{'type': 'allowed_tools'\} is not served; give auto,"),
        ([WEATHER], "any", "tool_choice='any' is not served; give auto, none, required, or a function"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_by_name(tools, choice, message):
    with pytest.raises(RequestError, match=message):
        form_of_calls(tools, choice)


@settings(max_examples=150)
@given(before=st.text(max_size=9), calls=CALLS)
def test_calls_are_read_as_they_were_written(before, calls):
    around, found = find_calls(before + rendered(*calls), NAMES)
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert around == (before.rstrip() if calls else before)


@settings(max_examples=150)
@given(parts=st.lists(TEXTS | CALLS.map(lambda calls: rendered(*calls)), max_size=4), data=st.data())
def test_what_comes_in_pieces_is_told_as_if_it_came_at_once(parts, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    before, told = TextBeforeCalls(NAMES), ""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        told += before.add(text[start:end])
        assert text.startswith(told)
        assert BEGIN not in told
    rest, calls = before.end()
    assert (told + rest, calls) == find_calls(text, NAMES)


@pytest.mark.parametrize(
    "text",
    [
        ONE.removesuffix(">"),
        ONE.replace("weather", "other"),
        ONE.replace('{"city": "Paris"}', "[1]"),
        ONE.replace('"Paris"', "NaN"),
        ONE.replace('"Paris"', "9" * 5000),
        ONE.replace('"Paris"', "[" * 100_000),
        ONE.replace('"name"', '"function"'),
        ONE.replace('"name": "weather", ', ""),
        ONE.replace("}}", '}, "more": 1}'),
    ],
)
def test_what_is_no_call_stays_text(text):
    assert find_calls(text, NAMES) == (text, [])
    assert find_calls(f"{text}a{ONE}", NAMES) == (f"{text}a", [Call("weather", '{"city": "Paris"}')])


def test_a_call_is_told_as_the_model_wrote_it():
    text = f'Hm <tool_call> {{"arguments":{{"a": 1.50, "b":\n1e999}} , "name": "weather"}}</tool_call> so\n{ONE}\n'
    around, calls = find_calls(text, NAMES)
    assert around == "Hm  so"
    first, second = calls_message(calls, "abc", 1)
    assert first["function"] == {"name": "weather", "arguments": '{"a": 1.50, "b":\n1e999}'}
    assert first["id"] == "call_abc_1_0" != second["id"]
