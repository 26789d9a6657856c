"""What a request may ask of the engine, as one object or as keywords of a call."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.errors import RequestError
from fineserve_jax.request.request_options import OptionKeywords, RequestOptions, one_each, options_of_each
from fineserve_jax.request.sampling_params import SamplingParams

BASE = RequestOptions(tenant="alice", ttft_slo_s=2.0)


def test_every_option_is_a_keyword():
    assert OptionKeywords.__annotations__.keys() == RequestOptions.model_fields.keys()


def test_keywords_are_one_for_all_or_one_for_each():
    found = options_of_each(2, None, {"kv_precision": ["int8", None], "priority": (1, 2), "tenant": "bob"})
    assert found == [
        RequestOptions(kv_precision="int8", priority=1, tenant="bob"),
        RequestOptions(priority=2, tenant="bob"),
    ]


def test_keywords_set_what_the_object_leaves_unset():
    assert options_of_each(2, BASE, {"drop_when_late": [True, None], "tenant": None}) == [
        RequestOptions(tenant="alice", ttft_slo_s=2.0, drop_when_late=True),
        BASE,
    ]
    other = RequestOptions(priority=3)
    assert options_of_each(2, [BASE, other], {}) == [BASE, other]


@pytest.mark.parametrize(
    ("options", "keywords", "error"),
    [
        (BASE, {"tenant": "bob"}, "^prompt 0: tenant is given in options and as a keyword; give it in one of them"),
        (None, {"heat": 1}, "unknown option 'heat'; the options of a request are: model, kv_precision, "),
        (None, {"priority": [1]}, "priority has 1 entries for 2 prompts; give one for all, or one each"),
        ([BASE], {}, "options has 1 entries for 2 prompts"),
        ({"tenant": "bob"}, {}, "options holds a dict; give RequestOptions, one for all or one each"),
        (None, {"ttft_slo_s": [1, 0]}, "^prompt 1: ttft_slo_s=0 is no latency target; give seconds, more than 0"),
        (None, {"priority": "high"}, "priority=a JSON string is no priority; give a whole number"),
        (None, {"priority": True}, "priority=a JSON boolean is no priority"),
        (None, {"priority": 2**31}, "priority=2147483648 is no priority; give a whole number, -2147483647 to"),
        (None, {"drop_when_late": True}, "drop_when_late without a ttft_slo_s drops nothing"),
        (None, {"model": 5}, 'model=5 is a JSON number; give text such as "smollm2-135m"'),
        (None, {"tenant": {"name": "bob"}}, "tenant={'name': 'bob'} is a JSON object; give text such as \"alice\""),
    ],
)
def test_what_makes_no_sense_is_refused(options, keywords, error):
    with pytest.raises(RequestError, match=error):
        options_of_each(2, options, keywords)


def test_none_unsets_every_option():
    assert RequestOptions(**dict.fromkeys(RequestOptions.model_fields)) == RequestOptions()


@given(st.dictionaries(st.sampled_from(sorted(RequestOptions.model_fields)), st.integers() | st.floats() | st.text()))
def test_no_value_raises_anything_but_a_request_error(fields):
    with contextlib.suppress(RequestError):
        RequestOptions(**fields)


def test_one_each_takes_objects_of_its_kind_only():
    greedy = SamplingParams()
    assert one_each(greedy, SamplingParams, 2, "sampling_params") == [greedy, greedy]
    with pytest.raises(RequestError, match="sampling_params holds a str; give SamplingParams, one for all or one each"):
        one_each("greedy", SamplingParams, 1, "sampling_params")


def test_none_unsets_what_there_is_and_nothing_else():
    assert RequestOptions(kv_precision=None, priority=None) == RequestOptions()
    with pytest.raises(RequestError, match="unknown setting 'kv_precison'"):
        RequestOptions(kv_precison=None)  # type: ignore[call-arg]
