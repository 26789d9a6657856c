"""The forms of prompts in Python: what is taken for one prompt, what for several, and what is refused."""

import numpy as np
import pytest
from engine_cases import character_tokenizer, random_model

from fineserve_jax.engine.prompts import conversation_list, encode_prompt, is_conversation, prompt_list
from fineserve_jax.errors import RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import tokenizer
from fineserve_jax.loaders.token_bound import TokenBound
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

TOKENIZER = character_tokenizer()
IDS = [5, 6, 7]
TABLE = {"prompt_token_ids": IDS}
FOUR = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture
def llm(make_llm) -> LLM:
    return make_llm()


@pytest.mark.parametrize(
    "prompt",
    [
        IDS,
        tuple(IDS),
        range(5, 8),
        (token for token in IDS),
        np.array(IDS),
        np.array(IDS, np.uint16),
        [np.int32(5), 6, np.uint64(7)],
        TABLE,
        {"prompt_token_ids": np.array(IDS), "prompt": None},
        {"prompt_token_ids": iter(IDS), "prompt": "what they say"},
    ],
)
def test_token_ids_of_any_kind_of_whole_number(prompt):
    (listed,) = prompt_list(prompt)
    text, token_ids = encode_prompt(TOKENIZER, listed)
    assert token_ids == IDS
    assert {type(token) for token in token_ids} == {int}
    assert text == (prompt.get("prompt") if isinstance(prompt, dict) else None)


@pytest.mark.parametrize(
    ("prompts", "count"),
    [
        ("text", 1),
        ({"prompt": "text"}, 1),
        (["text", IDS, TABLE, np.array(IDS)], 4),
        ((text for text in ("a", "b")), 2),
        ((ids for ids in (IDS, IDS, IDS)), 3),
        (np.array([IDS, IDS]), 2),
        (np.array(["a", "b"]), 2),
        (np.array("a"), 1),
        ([np.array(IDS)], 1),
        ([], 0),
        (iter(()), 0),
    ],
)
def test_several_prompts_are_told_from_one(prompts, count):
    listed = prompt_list(prompts)
    assert len(listed) == count
    for prompt in listed:
        assert encode_prompt(TOKENIZER, prompt)[1]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ([5.0, 6], "token 0 of the prompt is 5.0: a token id is a whole number, not a float"),
        ([5, True], "token 1 of the prompt is True: a token id is a whole number, not a bool"),
        ([True], "token 0 of the prompt is True: .* not a bool"),
        (np.array([5.0, 6.0]), "token 0 of the prompt is 5.0: .* not a float"),
        (np.array([True, False]), "token 0 of the prompt is True: .* not a bool"),
        ([5, np.float32(6)], r"token 1 of the prompt is np.float32\(6.0\): .* not a float32"),
        ([5, np.bool_(True)], "token 1 of the prompt is .*: .* not a bool"),
        ([5, None], "token 1 of the prompt is None: .* not a NoneType"),
        ([5, "a"], "token 1 of the prompt is 'a': .* not a str"),
        ({"prompt_token_ids": [5, 6.5]}, "token 1 of the prompt is 6.5"),
        ({"prompt_token_ids": "text"}, "the prompt is a str; give a list of token ids"),
        ({"prompt": 5}, "prompt in the prompt's table is a int; give text, or prompt_token_ids"),
        (
            {"prompt": "a", "multi_modal_data": {}},
            "the prompt is a table with the key 'multi_modal_data'; give",
        ),
        ({"prompt_token_ids": None}, "the prompt is a table with neither text nor token ids"),
        ({}, "the prompt is a table with neither text nor token ids"),
        ([b"bytes"], "the prompt is a bytes; give a list of token ids"),
        ([{5, 6}], "the prompt is a set; give a list of token ids"),
        ([None], "the prompt is a NoneType"),
        (b"bytes", "prompts is a bytes; give text"),
        (None, "prompts is a NoneType; give text"),
        (5, "prompts is a int; give text"),
        (np.array(5), "prompts is a int; give text"),
        ([np.array(5)], "the prompt is a int; give a list of token ids"),
        ({5, 6}, "prompts is a set; give text, a list of token ids"),
    ],
)
def test_other_prompts_are_refused_by_their_type(prompt, error):
    with pytest.raises(RequestError, match=error):
        encode_prompt(TOKENIZER, prompt_list(prompt)[0])


def test_conversations_are_told_from_prompts():
    messages = [{"role": "user", "content": "Hi"}]
    assert conversation_list(messages) == conversation_list(iter(messages)) == [messages]
    assert conversation_list([messages, messages]) == conversation_list(iter([messages] * 2)) == [messages, messages]
    assert is_conversation(messages)
    assert not any(map(is_conversation, ("text", "", [], IDS, np.array(IDS), np.array([]), TABLE, iter(IDS))))


def test_every_form_gives_the_same_tokens(llm):
    forms = [IDS, np.array(IDS), TABLE, iter(IDS)]
    outputs = llm.generate((form for form in forms), (FOUR for _ in forms), priority=np.arange(4))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) == 1
    text = outputs[0].outputs[0].text
    assert [output.prompt_token_ids for output in outputs] == [IDS] * 4
    for form in (IDS, np.array(IDS), TABLE, iter(IDS)):
        assert "".join(llm.stream(form, FOUR)) == text


def test_a_bad_token_is_named_with_its_prompt(llm):
    with pytest.raises(RequestError, match=r"^prompt 1: token 2 of the prompt is 1.5: "):
        llm.generate([IDS, [1, 2, 1.5]], FOUR)
    with pytest.raises(RequestError, match=r"^token 0 of the prompt is True: "):
        llm.engine.prepare([True])
    with pytest.raises(RequestError, match=r"^the prompt is a str; "):
        llm.engine.prepare("text")
    assert llm.stats().num_steps == 0


def test_a_prompt_of_far_too_many_characters_is_refused_by_its_length(make_llm, monkeypatch):
    monkeypatch.setattr(tokenizer, "token_bound", lambda backend: TokenBound(10, 1, False))
    llm = make_llm(random_model())  # its tokenizer has no bound yet
    error = "has 1000000 characters, which are at least 100000 tokens; it may have 255; shorten it or raise max_seq_len"
    for answer in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match=error):
            answer("x" * 10**6, FOUR)


def test_numpys_numbers_are_taken_in_parameters_and_options():
    numbers = SamplingParams(
        max_tokens=np.int64(5), temperature=np.float32(0.5), stop_token_ids=np.array([3]), logit_bias={np.int32(4): 1}
    )
    assert numbers == SamplingParams(max_tokens=5, temperature=0.5, stop_token_ids=(3,), logit_bias={4: 1.0})
    assert RequestOptions(priority=np.int64(2), ttft_slo_s=np.float32(0.5)).priority == 2


def test_a_bad_value_that_cannot_be_written_out_is_still_named():
    with pytest.raises(RequestError, match=r"^seed=a int too large to show: "):
        SamplingParams(seed=10**5000)
