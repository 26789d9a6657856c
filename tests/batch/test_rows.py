"""What a line of the input may say, and what is said about one that may not."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import tiny_tokenizer

from fineserve_jax import RequestError, SamplingParams
from fineserve_jax.batch.rows import ROW_FIELDS, BadRow, BatchRow, parse_row, prompt_tokens, read_rows, row_sampling
from fineserve_jax.request_options import RequestOptions

TOKENIZER = tiny_tokenizer()
CHAT = [{"role": "user", "content": "Hi"}]


def row(**fields):
    return parse_row(json.dumps(fields).encode(), 7)


def test_a_row_has_the_line_as_id_unless_it_brings_one():
    assert row(prompt="a").id == 7
    assert row(prompt="a", id=None).id == 7
    assert row(prompt="a", id="x").id == "x"
    assert row(prompt="a", id=0).id == 0


def test_sampling_fields_beat_the_defaults_and_null_unsets_them():
    defaults = {"temperature": 0.5, "max_tokens": 9}
    sampling = row_sampling(row(prompt="a", max_tokens=None, top_k=3, stop=["x", "y"]), defaults)
    assert sampling == SamplingParams(temperature=0.5, top_k=3, stop=("x", "y"))


def test_every_sampling_field_may_stand_in_a_row():
    fields = SamplingParams().model_dump()
    assert row_sampling(row(prompt="a", **fields), {"temperature": 1.0}) == SamplingParams()


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
        (b'{"prompt": "a", "id": 1.5}', r"id is a JSON number; give text or a whole number, or none"),
        (b'{"prompt": "a", "id": true}', r"id is a JSON boolean; give text or a whole number, or none"),
        (b'{"prompt": "a", "id": [1]}', r"id is a JSON list of .*; give text or a whole number, or none"),
        (b'{"prompt": "a", "heat": 1}', r"unknown field 'heat'; a row may have: id, prompt, .*temperature.*"),
    ],
)
def test_a_line_that_is_no_row_says_why(line, error):
    bad = parse_row(line, 7)
    assert isinstance(bad, BadRow)
    assert bad.line == 7
    assert_matches(bad.error, error)


def assert_matches(text, pattern):
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        raise ValueError(text)


def test_a_bad_row_keeps_its_id():
    assert row(id="mine").id == "mine"
    assert row(id="mine", prompt="a", heat=1).id == "mine"
    assert row(id=True, prompt="a").id == 7


@given(st.binary())
def test_no_line_whatever_raises(line):
    assert isinstance(parse_row(line, 1), BatchRow | BadRow)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda x: (
            st.lists(x) | st.dictionaries(st.sampled_from(["prompt", "id", "messages", "kv_precision", "stop"]), x)
        ),
    )
)
def test_no_json_whatever_raises(content):
    assert isinstance(parse_row(json.dumps(content).encode(), 1), BatchRow | BadRow)


TEXT = st.text(st.characters(exclude_categories=()), max_size=4)  # half of a surrogate pair is JSON, too
NUMBERS = st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.just(10**400)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(ROW_FIELDS), JSON, max_size=4))
def test_any_json_in_any_field_is_taken_or_refused(fields):
    found = parse_row(json.dumps({"prompt": "a", **fields}).encode(), 1)
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
    )
    assert options.model_fields_set == RequestOptions.model_fields.keys()
    assert row(prompt="a", **options.model_dump()).options == options
    assert row(prompt="a", **dict.fromkeys(RequestOptions.model_fields)).options == RequestOptions()


def test_empty_lines_count_and_a_byte_order_mark_does_not():
    lines = [b'\xef\xbb\xbf{"prompt": "a"}\n', b"\n", b"  \r\n", b'{"prompt": "b"}']
    assert [(r.line, r.prompt) for r in read_rows(lines)] == [(1, "a"), (4, "b")]


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
