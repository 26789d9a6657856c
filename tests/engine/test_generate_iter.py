"""Outputs as they come, of prompts that are asked for one by one."""

import itertools

import pytest
from engine_cases import check_nothing_is_left

from fineserve_jax.errors import RequestError
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

SHORT = SamplingParams(max_tokens=6, ignore_eos=True)


@pytest.fixture
def llm(make_llm):
    with make_llm() as llm:
        yield llm
    check_nothing_is_left(llm)


def prompts(count=None):
    numbers = itertools.count() if count is None else range(count)
    return (f"prompt {i}" for i in numbers)


@pytest.mark.parametrize("ordered", [False, True])
def test_each_prompt_has_the_output_that_generate_gives(llm, ordered):
    samplings = [SamplingParams(max_tokens=1 + 7 * i % 20, ignore_eos=True, n=1 + i % 2) for i in range(30)]
    expected = llm.generate(prompts(30), samplings)
    found = list(llm.generate_iter(prompts(30), iter(samplings), ordered=ordered, look_ahead=9))
    indices = [output.index for output in found]
    assert sorted(indices) == list(range(30))
    assert (indices == list(range(30))) == ordered
    for output in found:
        wanted = expected[output.index]
        assert output.prompt == wanted.prompt
        assert [sample.text for sample in output.outputs] == [sample.text for sample in wanted.outputs]


@pytest.mark.parametrize("ordered", [False, True])
def test_prompts_without_end_are_asked_for_as_outputs_are_taken(llm, ordered):
    asked = []
    source = (asked.append(prompt) or prompt for prompt in prompts())
    outputs = llm.generate_iter(source, SHORT, ordered=ordered, look_ahead=4)
    assert not asked, "nothing is done before the first output is asked for"
    for num_taken in range(25):
        next(outputs)
        assert num_taken < len(asked) <= num_taken + 4
    outputs.close()
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_a_prompt_that_cannot_be_served_has_an_output_that_says_why(llm):
    mixed = ["fine", "x" * 300, [1, 2, 3], "", 7, [{"role": "user", "content": "Hi"}], "also fine"]
    outputs = list(llm.generate_iter(mixed, SHORT, ordered=True))
    errors = [output.outputs[0].error for output in outputs]
    assert [error is None for error in errors] == [True, False, True, False, False, False, True]
    assert "300 tokens" in errors[1]
    assert "the prompt is empty" in errors[3]
    assert "no chat template" in errors[5]
    assert [output.outputs[0].finish_reason for output in outputs if output.outputs[0].error] == ["error"] * 4


def test_each_prompt_may_have_options_of_its_own(llm):
    options = (RequestOptions(kv_precision=name) for name in itertools.cycle(["int8", "int4", "bf16"]))
    outputs = list(llm.generate_iter(prompts(6), SHORT, options, ordered=True, priority=3))
    assert [output.kv_precision for output in outputs] == ["int8", "int4", "bf16"] * 2


def test_what_the_source_raises_ends_the_iteration_and_what_was_under_way(llm):
    def failing():
        yield "one"
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        list(llm.generate_iter(failing(), SHORT))
    assert llm.stats().num_running == llm.stats().num_waiting == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": "a text"}, "prompts is a str; give an iterable of prompts, or use generate"),
        ({"look_ahead": 0}, "look_ahead=0: at least 1 prompt"),
        ({"kv_precision": ["int8"]}, "kv_precision is no single value"),
        ({"colour": "red"}, "unknown option 'colour'"),
        ({"sampling_params": 3}, "a int is no SamplingParams"),
        ({"options": [RequestOptions()]}, "options has no entry for prompt 1"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(llm, arguments, message):
    with pytest.raises(RequestError, match=message):
        list(llm.generate_iter(**{"prompts": prompts(2), **arguments}))
