"""What a line of the input may say, and what is said about one that may not."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer

from fineserve_jax import RequestError, SamplingParams
from fineserve_jax.entrypoints.batch.records import Record, line_records
from fineserve_jax.entrypoints.batch.requests import RowRequests
from fineserve_jax.entrypoints.batch.row_ids import id_key
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow, parse_row, read_rows
from fineserve_jax.entrypoints.openai_api import asked
from fineserve_jax.entrypoints.openai_api.asked import prompt_tokens
from fineserve_jax.entrypoints.openai_api.fields import FIELDS
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import OTHER_NAMES

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "Hi"}]


def parsed(line, number=7):
    return parse_row(Record(number, line))


def row(**fields):
    return parsed(json.dumps(fields).encode())


def row_sampling(row, defaults):
    return RowRequests(defaults).sampling(row)


def test_a_row_has_the_line_as_id_unless_it_brings_one():
    assert row(prompt="a").id == 7
    assert row(prompt="a", id=None).id == 7
    assert row(prompt="a", id="x").id == "x"
    assert row(prompt="a", id=0).id == 0
    for own in (1.5, -0.0, True, False, [], [1, "a", None], {}, {"b": [0.1], "a": {"c": None}}):
        assert json.dumps(row(prompt="a", id=own).id) == json.dumps(own)


def test_sampling_fields_beat_the_defaults_and_null_unsets_them():
    defaults = {"temperature": 0.5, "max_tokens": 9}
    sampling = row_sampling(row(prompt="a", max_tokens=None, top_k=3, stop=["x", "y"]), defaults)
    assert sampling == SamplingParams(temperature=0.5, top_k=3, stop=("x", "y"))


def test_every_sampling_field_may_stand_in_a_row():
    fields = SamplingParams().model_dump()
    assert row_sampling(row(prompt="a", **fields), {"temperature": 1.0}) == SamplingParams()


def test_null_stands_for_the_default_of_any_field():
    nulls = dict.fromkeys((*SamplingParams.model_fields, *OTHER_NAMES, *RequestOptions.model_fields, "id", "messages"))
    found = row(prompt="a", **nulls)
    assert found.id == 7
    assert row_sampling(found, {}) == SamplingParams()
    assert SamplingParams(**dict.fromkeys(SamplingParams.model_fields)) == SamplingParams()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"max_completion_tokens": 5}, {"max_tokens": 5, "logprobs": 2}),
        ({"max_completion_tokens": 5, "max_tokens": 5}, {"max_tokens": 5, "logprobs": 2}),
        ({"max_completion_tokens": 5, "max_tokens": None}, {"max_tokens": 5, "logprobs": 2}),
        ({"max_completion_tokens": None, "max_tokens": 5}, {"max_tokens": 5, "logprobs": 2}),
        ({"max_completion_tokens": None}, {"logprobs": 2}),
        ({"logprobs": False}, {"max_tokens": 9}),
        ({"logprobs": True}, {"max_tokens": 9, "logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 3}, {"max_tokens": 9, "logprobs": 3}),
        ({"logprobs": True, "top_logprobs": None}, {"max_tokens": 9, "logprobs": 0}),
        ({"logprobs": False, "top_logprobs": 0}, {"max_tokens": 9}),
        ({"logprobs": 3, "top_logprobs": 3}, {"max_tokens": 9, "logprobs": 3}),
        ({"top_logprobs": None}, {"max_tokens": 9, "logprobs": 2}),
        (
            {"response_format": {"type": "json_object"}},
            {"max_tokens": 9, "logprobs": 2, "structured_outputs": {"json_object": True}},
        ),
    ],
)
def test_openais_names_and_forms_are_taken_and_beat_the_defaults(fields, expected):
    assert row_sampling(row(prompt="a", **fields), {"max_tokens": 9, "logprobs": 2}) == SamplingParams(**expected)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens=5 is not max_tokens=6; give one"),
        ({"top_logprobs": 3}, "top_logprobs=3 without logprobs gives none; set logprobs to true"),
        ({"top_logprobs": 3, "logprobs": False}, "top_logprobs=3 without logprobs gives none"),
        ({"top_logprobs": 3, "logprobs": 2}, "top_logprobs=3 is not logprobs=2; give one number"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs=21 is no whole number from 0 to 20"),
        ({"top_logprobs": True, "logprobs": True}, "top_logprobs=True is no whole number from 0 to 20"),
        ({"logprobs": 21}, "logprobs=21: .*less than or equal to 20"),
        ({"max_completion_tokens": 0}, "max_tokens=0 generates nothing, which is for prompt_logprobs alone"),
        ({"stop_token_ids": [5, True]}, "stop_token_ids.1=True: a token id is a whole number, not a bool"),
        ({"stop_token_ids": [1.0]}, "stop_token_ids.0=1.0: a token id is a whole number, not a float"),
        ({"stop_token_ids": [None]}, "stop_token_ids.0=None: a token id is a whole number, not a NoneType"),
        ({"temperature": True}, "temperature=True: a number is wanted, not true or false"),
        ({"n": True}, "n=True: a number is wanted, not true or false"),
        ({"max_completion_tokens": True}, "max_tokens=True: a number is wanted, not true or false"),
        ({"response_format": {"type": "yaml"}}, ".*its type is text, json_object or json_schema"),
        ({"structured_outputs": {"json": {"items": {"not": {}}}}}, '.*at #/items/not: "not" is not supported'),
        ({"temperature": ["x" * 10_000]}, r"temperature=\['x{198}\.\.\.: "),
    ],
)
def test_sampling_fields_that_are_refused(fields, error):
    with pytest.raises(RequestError, match=f"^{error}"):
        row_sampling(row(prompt="a", **fields), {})
    with pytest.raises(RequestError, match=f"^{error}"):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, 1.0),
        (0, -0.0),
        (10**20, 1e20),
        ([1, {"a": 2}], [1.0, {"a": 2.0}]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ],
)
def test_ids_that_are_equal(one, other):
    assert id_key(one) == id_key(other)
    assert hash(id_key(one)) == hash(id_key(other))


def test_ids_that_differ():
    ids = [1, True, False, 0, "1", "", 0.5, "0.5", [], {}, [1], ["1"], [True], [[1]], [None], {"a": 1}, {"a": True}]
    ids += [["a", 1], [["a", 1]], {"a": None}, "true", [False], 2**53 + 1, 2**53]
    assert len({id_key(one) for one in ids}) == len(ids)


def test_a_fault_in_checking_a_row_is_that_rows(monkeypatch):
    monkeypatch.setattr(asked, "REMEMBERED_OPTIONS", None)
    bad = row(id="x", prompt="a")
    assert (bad.line, bad.id) == (7, "x")
    assert bad.error.startswith("the row cannot be prepared: TypeError: ")
    assert bad.error.endswith("this is a fault of fineserve-jax, please report it with the row")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b'{"prompt": ', r"line 7 is not JSON: .*"),
        (b'{"prompt": "a"} {"prompt": "b"}', r"line 7 is not JSON: .*"),
        (b'{"prompt": "a", "temperature": NaN}', r"line 7 is not JSON: NaN is no JSON value"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", r"line 7 is not JSON: .*"),
        (b"[" * 100_000, r"line 7 is not JSON: .*"),
        (b'{"prompt": "\xff"}', r"line 7 is not UTF-8: .* at byte 12"),
        (b'["a"]', r"line 7 holds a JSON list.*, not an object with a prompt"),
        (b"null", r"line 7 holds a JSON null, not an object with a prompt"),
        (b'{"id": "x"}', r"the row has neither prompt nor messages; give one of them"),
        (b'{"prompt": "a", "messages": []}', r"the row has both prompt and messages; give one of them"),
        (b'{"prompt": 5}', r"prompt is a JSON number; give text, or a list of token ids"),
        (b'{"prompt": ["a", "b"]}', r"prompt is a JSON list of more than whole numbers; give .*"),
        (b'{"prompt": [1, true]}', r"prompt is a JSON list of more than whole numbers; give .*"),
        (b'{"prompt": [1.0]}', r"prompt is a JSON list of more than whole numbers; give .*"),
        (b'{"messages": "Hi"}', r"messages is a JSON string; give a list of objects with role and content"),
        (b'{"prompt": "a", "kv_precision": 8}', r'kv_precision=8 is a JSON number; give text such as "int8"'),
        (b'{"prompt": "a", "ttft_slo_s": 0}', r"ttft_slo_s=0 is no latency target; give seconds, more than 0, or none"),
        (b'{"prompt": "a", "tpot_slo_s": -0.5}', r"tpot_slo_s=-0.5 is no latency target; .*"),
        (b'{"prompt": "a", "tpot_slo_s": 1e999}', r"tpot_slo_s=inf is no latency target; .*"),
        (b'{"prompt": "a", "tpot_slo_s": true}', r"tpot_slo_s=a JSON boolean is no latency target; .*"),
        (b'{"prompt": "a", "ttft_slo_s": "1"}', r"ttft_slo_s=a JSON string is no latency target; .*"),
        (b'{"prompt": "a", "drop_when_late": 1}', r"drop_when_late=1 is neither true nor false; .*"),
        (b'{"prompt": "a", "id": 1e400}', r"id=inf: a number of the id is greater than a double can hold; .*"),
        (b'{"prompt": "a", "id": [[-1e400]]}', r"id=.*: a number of the id is greater than .*"),
        (b'{"prompt": "a", "id": ' + b"[" * 66 + b"]" * 66 + b"}", r"id=.*: the id has .* in more than 64 levels; .*"),
        (b'{"prompt": "a", "heat": 1}', r"unknown field 'heat'; a row may have: id, prompt, .*temperature.*"),
    ],
)
def test_a_line_that_is_no_row_says_why(line, error):
    bad = parsed(line)
    assert isinstance(bad, BadRow)
    assert bad.line == 7
    assert_matches(bad.error, error)


def assert_matches(text, pattern):
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        raise ValueError(text)


def test_a_bad_row_keeps_its_id():
    assert row(id="mine").id == "mine"
    assert row(id="mine", prompt="a", heat=1).id == "mine"
    assert row(id=True).id is True
    assert parsed(b'{"id": 1e400}').id == 7


@given(st.binary())
def test_no_line_whatever_raises(line):
    assert isinstance(parsed(line, 1), BatchRow | BadRow)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x) | st.dictionaries(st.sampled_from(["prompt", "id", "messages", "kv_precision", "stop"]), x)
        ),
    )
)
def test_no_json_whatever_raises(content):
    assert isinstance(parsed(json.dumps(content).encode(), 1), BatchRow | BadRow)


TEXT = st.text(st.characters(exclude_categories=()), max_size=4)  # half of a surrogate pair is JSON, too
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just(10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(("id", *FIELDS)), JSON, max_size=4))
def test_any_json_in_any_field_is_taken_or_refused(fields):
    found = parsed(json.dumps({"prompt": "a", **fields}).encode(), 1)
    if isinstance(found, BatchRow):
        with contextlib.suppress(RequestError):
            row_sampling(found, {})
        with contextlib.suppress(RequestError):
            prompt_tokens(found, TOKENIZER)
    else:
        json.dumps({"id": found.id, "error": found.error})


def test_every_option_may_stand_in_a_row_and_null_unsets_it():
    options = RequestOptions(
        model="m",
        kv_precision="int8",
        min_kv_precision="int4",
        tenant="alice",
        priority=-1,
        ttft_slo_s=1.5,
        tpot_slo_s=1,
        drop_when_late=True,
        deadline_s=60.0,
        num_speculative_tokens=0,
    )
    assert options.model_fields_set == RequestOptions.model_fields.keys()
    assert row(prompt="a", **options.model_dump()).options == options
    assert row(prompt="a", **dict.fromkeys(RequestOptions.model_fields)).options == RequestOptions()


def test_empty_lines_count_and_a_byte_order_mark_does_not():
    lines = [b'\xef\xbb\xbf{"prompt": "a"}\n', b"\n", b"  \r\n", b'{"prompt": "b"}']
    assert [(r.line, r.prompt) for r in read_rows(line_records(lines))] == [(1, "a"), (4, "b")]


def test_prompts_become_tokens():
    tokenizer = tiny_tokenizer()
    assert prompt_tokens(row(prompt="a b"), tokenizer) == tokenizer.encode("a b")
    assert prompt_tokens(row(prompt=[4, 5]), tokenizer) == [4, 5]
    rendered = tokenizer.encode("<user>Hi\n<assistant>", add_special_tokens=False)
    assert prompt_tokens(row(messages=CHAT), tokenizer) == rendered


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "user"}]}, "message 0 has content of type NoneType"),
        ({"prompt": "\ud800"}, "not valid Unicode"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "not valid Unicode"),
    ],
)
def test_prompts_that_cannot_become_tokens_are_refused(fields, error):
    with pytest.raises(RequestError, match=error):
        prompt_tokens(row(**fields), tiny_tokenizer())


def test_messages_need_a_template():
    with pytest.raises(RequestError, match="no chat template"):
        prompt_tokens(row(messages=CHAT), tiny_tokenizer(chat_template=None))


def test_what_is_said_of_rendering_is_for_messages():
    messages = [{"role": "user", "content": "hi"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = parsed(json.dumps({"messages": messages, "tools": tools, "chat_template": None}).encode(), 1)
    assert isinstance(row, BatchRow)
    assert (row.chat.tools, row.chat.chat_template) == (tools, None)
    bad = parsed(json.dumps({"prompt": "hi", "tools": tools}).encode(), 1)
    assert isinstance(bad, BadRow)
    assert bad.error == "tools is for messages, the row has a prompt; leave it out"
    wrong = parsed(json.dumps({"messages": messages, "tools": "f"}).encode(), 1)
    assert isinstance(wrong, BadRow)
    assert wrong.error.startswith("tools='f': ")
