"""`LLM.score`: completions that are given, each after its prompt."""

import math

import numpy as np
import pytest
import tokenizers
from engine_cases import check_nothing_is_left, with_nan
from test_prompt_logprobs import ERROR, expected_logprobs
from tokenizers import models

from fineserve_jax.engine import load as load_engine
from fineserve_jax.engine.scoring import encode_completion
from fineserve_jax.errors import RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request.sampling_params import SamplingParams

PROMPTS = ["The sky over the harbour was the colour of ", "Water boils at "]
COMPLETIONS = [["television", "tea", "a"], ["100 degrees"]]


FORMATS = ("fp32", "int8")


@pytest.fixture(scope="module")
def make_llm(tiny_model):
    """LLMs of the tiny model, all with the same programs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_engine, "use_compilation_cache", lambda: None)

        def make(model=tiny_model) -> LLM:
            patch.setattr(load_engine, "load_model", lambda *_: model)
            sizes = {"max_seq_len": 128, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "4MiB"}
            llm = LLM("tiny", kv_precision="fp32", kv_formats=FORMATS, **sizes)
            llm.engine.runner.use_formats(FORMATS)
            return llm

        yield make


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm()


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
    assert llm.stats().num_prompt_tokens - before == 64 + (10 + 1) + (10 + 1) + (10 + 20)


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
        (["a"], [["c" * 128]], "prompt 0, completion 0: the prompt has 129 tokens; with max_seq_len=128 it may have"),
    ],
)
def test_what_cannot_be_scored_is_named_before_anything_is_computed(llm, prompts, completions, error):
    before = llm.stats().num_steps
    with pytest.raises(RequestError, match=error):
        llm.score(prompts, completions)
    assert llm.stats().num_steps == before


def test_what_cannot_be_computed_has_an_error_and_the_others_have_scores(llm, make_llm, tiny_model):
    spoilt = make_llm(with_nan(tiny_model, 7))
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
