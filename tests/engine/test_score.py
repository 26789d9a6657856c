"""`LLM.score`: completions that are given, each after its prompt."""

import math

import numpy as np
import pytest
import tokenizers
from engine_cases import check_nothing_is_left, random_model, with_nan
from test_prompt_logprobs import ERROR, expected_logprobs
from tokenizers import models

from fineserve_jax.engine import scoring
from fineserve_jax.engine.scoring import Scoring, encode_completion
from fineserve_jax.engine.tickets import Inbox
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request.sampling_params import SamplingParams

PROMPTS = ["The sky over the harbour was the colour of ", "Water boils at "]
COMPLETIONS = [["television", "tea", "a"], ["100 degrees"]]


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(kv_precision="fp32")


def test_each_completion_is_scored_given_its_prompt(llm):
    found = llm.score(PROMPTS, COMPLETIONS)
    assert [len(scores) for scores in found] == [3, 1]
    for prompt, completions, scores in zip(PROMPTS, COMPLETIONS, found, strict=True):
        for completion, score in zip(completions, scores, strict=True):
            tokens = tuple(llm.tokenizer.encode(prompt + completion))
            logprobs = expected_logprobs(tokens)[len(prompt) - 1 :]
            assert score.token_ids == llm.tokenizer.encode(completion)
            own = logprobs[np.arange(len(score.token_ids)), score.token_ids]
            np.testing.assert_allclose(score.logprobs, own, atol=ERROR)
            assert score.total == pytest.approx(own.sum(), abs=ERROR * len(own))
            assert score.is_greedy == (logprobs.argmax(-1) == score.token_ids).tolist()
            assert score.error is None
    check_nothing_is_left(llm)


def test_greedy_completions_are_just_those_that_are_sampled(llm):
    (output,) = llm.generate(PROMPTS[0], SamplingParams(max_tokens=6, ignore_eos=True, logprobs=0))
    tokens = output.outputs[0].token_ids
    other = [*tokens[:3], (tokens[3] + 1) % 96, *tokens[4:]]
    ((same, different),) = llm.score(PROMPTS[0], [tokens, other])
    assert same.all_greedy
    np.testing.assert_allclose(same.logprobs, [entry.logprob for entry in output.outputs[0].logprobs], atol=ERROR)
    assert not different.all_greedy
    assert different.is_greedy[:4] == [True, True, True, False]


def test_a_prompt_is_computed_once_for_all_its_completions(llm):
    before = llm.stats().num_prompt_tokens
    prompt = "b" * 64 + "c" * 10
    llm.score([prompt], [["d", "e", "f" * 20]])
    assert llm.stats().num_prompt_tokens - before == 74 + 0 + 0 + 19
    llm.score([prompt], [["d", "e", "f" * 52]])  # the last has no room in a step, and is a request by itself
    assert llm.stats().num_prompt_tokens - before == 74 + 19 + 10 + (10 + 52)


def test_completions_are_scored_as_each_would_be_alone(llm):
    """Wherever their prompt ends in a page, however many they are, and whatever shares the steps."""
    rng = np.random.default_rng(0)
    lengths = [(1, [1, 20]), (15, [3]), (16, [1, 2]), (33, [17, 30, 1]), (90, [16, 33])]
    prompts = [rng.integers(1, 96, length).tolist() for length, _ in lengths]
    completions = [[rng.integers(1, 96, own).tolist() for own in wanted] for _, wanted in lengths]
    for prompt, own, scores in zip(prompts, completions, llm.score(prompts, completions), strict=True):
        for completion, score in zip(own, scores, strict=True):
            logprobs = expected_logprobs((*prompt, *completion))[len(prompt) - 1 :]
            np.testing.assert_allclose(score.logprobs, logprobs[np.arange(len(completion)), completion], atol=ERROR)
    check_nothing_is_left(llm)


def test_a_branch_in_a_quantised_format_is_as_a_request_of_its_own(llm, monkeypatch):
    prompt, completions = list(range(1, 31)), [[5, 6, 7], [8, 9], list(range(10, 40))]
    (together,) = llm.score(prompt, completions, kv_precision="int8")
    monkeypatch.setattr(scoring, "_most_branch_tokens", lambda *arguments: -1)
    (alone,) = llm.score(prompt, completions, kv_precision="int8")
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=ERROR)


@pytest.mark.parametrize(
    ("shape", "settings", "kv_precision", "branches"),
    [
        ({}, {}, "int8", [2, 1]),  # 48 tokens have room beside a page
        ({}, {}, "int4", [0, 0, 0]),  # which encodes whole pages
        ({}, {"reproducible": True}, "int8", [0, 0, 0]),
        ({}, {"chunked_prefill": False}, "int8", [0, 0, 0]),
        ({}, {"check_finite": True}, "int8", [0, 0, 0]),
        ({"sliding_window": 20}, {}, "int8", [0, 0, 0]),
    ],
)
def test_completions_are_branches_where_that_changes_nothing(make_llm, shape, settings, kv_precision, branches):
    llm = make_llm(random_model(**shape), kv_precision="fp32", **settings)
    call = Scoring([[5, 6, 7]], [[[8] * 30, [9], [10] * 21]], None, {"kv_precision": kv_precision})
    tickets = call.tickets(llm.engine, Inbox())
    assert [len(ticket.prepared.branches) for ticket in tickets] == branches


def test_prompts_and_completions_may_be_tokens_and_have_options_of_their_own(llm):
    prompt, completion = llm.tokenizer.encode(PROMPTS[0]), llm.tokenizer.encode("tea")
    ((of_tokens, of_text),) = llm.score(prompt, [np.array(completion), "tea"])
    assert of_tokens == of_text
    ((wide,), (narrow,)) = llm.score([PROMPTS[0]] * 2, [["tea"]] * 2, kv_precision=["fp32", "int8"])
    assert wide.total == pytest.approx(of_text.total, abs=3 * ERROR)
    assert 0 < abs(wide.total - narrow.total) < 0.5
    assert llm.score([], []) == []
    assert llm.score(["a"], [[]]) == [[]]


@pytest.mark.parametrize(
    ("prompts", "completions", "error"),
    [
        ("a", "b", "completions has a str where a list is wanted"),
        (["a"], ["b"], "completions has a str where a list is wanted"),
        (["a", "b"], [["c"]], "completions has 1 lists for 2 prompts"),
        (["a", "b"], [["c"], ["d", ""]], "prompt 1, completion 1: the completion is empty"),
        (["a", ""], [["c"], ["d"]], "prompt 1: the prompt is empty"),
        (["a"], [["c", [5, 96]]], "prompt 0, completion 1: prompt has token 96"),
        (["a"], [["c" * 256]], "prompt 0, completion 0: the prompt has 257 tokens; with max_seq_len=256 it may have"),
    ],
)
def test_what_cannot_be_scored_is_named_before_anything_is_computed(llm, prompts, completions, error):
    before = llm.stats().num_steps
    with pytest.raises(RequestError, match=error):
        llm.score(prompts, completions)
    assert llm.stats().num_steps == before


def test_what_cannot_be_computed_has_an_error_and_the_others_have_scores(llm, make_llm, tiny_model):
    spoilt = make_llm(with_nan(tiny_model, 7), kv_precision="fp32")
    ((good, bad),) = spoilt.score([5, 6, 8], [[9, 10], [7, 9, 7, 9]])
    ((expected,),) = llm.score([5, 6, 8], [[9, 10]])
    np.testing.assert_allclose(good.logprobs, expected.logprobs, atol=ERROR)
    assert "not finite" in bad.error
    assert math.isnan(bad.total)
    assert not bad.all_greedy
    ((late,),) = llm.score("a", ["b"], ttft_slo_s=1e-9, drop_when_late=True)
    assert late.error == "it ended before it was scored, with the reason 'late'"
    assert math.isnan(late.total)


def test_a_text_is_scored_by_the_tokens_that_it_has_behind_its_prompt():
    """Where tokens reach across the joint, these are the completion's."""
    vocabulary = {text: i for i, text in enumerate(["a", "b", "c", "ab", "abc"])}
    tokenizer = Tokenizer(tokenizers.Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")])), ())

    def split(prompt: str, completion: str) -> tuple[list[str], list[str]]:
        tokens, first = encode_completion(tokenizer, prompt, tokenizer.encode(prompt), completion)
        texts = [tokenizer.token_text(token) for token in tokens]
        return texts[:first], texts[first:]

    assert split("bab", "ca") == (["b"], ["abc", "a"])
    assert split("bb", "ab") == (["b", "b"], ["ab"])
    assert split("caba", "b") == (["c", "ab"], ["ab"])
    with pytest.raises(RequestError, match="no token of the prompt is left"):
        split("a", "b")
