"""The text of a request as its tokens come: stop strings, special tokens, and what the text continues."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from fineserve_jax.engine.detokenizer import IncrementalDetokenizer
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request.sampling_params import SamplingParams

WORDS = ["▁blue", "▁is", "a", "b", "\n", "<|end|>"]
SPM = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


@pytest.fixture(scope="module")
def tokenizer():
    backend = Backend(BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    backend.decoder = SPM
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, ())


def text_of(tokenizer, words, prompt=("▁is",), **sampling):
    """The text of these tokens, and how many of them it took until a stop string was found."""
    ids = [WORDS.index(word) for word in prompt]
    growing = IncrementalDetokenizer(tokenizer, SamplingParams(**sampling), ids)
    shown, used = "", len(words)
    for number, word in enumerate(words, start=1):
        stopped = growing.push(WORDS.index(word))
        shown += growing.take()
        if stopped:
            used = number
            break
    growing.finish()
    shown += growing.take()
    assert shown == growing.text
    return growing.text, used


def test_a_continuation_keeps_its_leading_space(tokenizer):
    assert text_of(tokenizer, ["▁blue"]) == (" blue", 1)
    assert text_of(tokenizer, ["▁blue", "a"], stop=" blue") == ("", 1)
    assert text_of(tokenizer, ["▁blue"], prompt=("<|end|>",)) == ("blue", 1)


@pytest.mark.parametrize(
    ("min_tokens", "expected"),
    [(0, ("a", 3)), (2, ("a", 3)), (3, ("a\n\nb", 6)), (5, ("a\n\nb", 6)), (6, ("a\n\nb\n\na", 7))],
)
def test_a_stop_string_counts_where_it_ends_behind_the_least_number_of_tokens(tokenizer, min_tokens, expected):
    words = ["a", "\n", "\n", "b", "\n", "\n", "a"]
    assert text_of(tokenizer, words, stop="\n\n", min_tokens=min_tokens) == expected


def test_a_stop_string_may_begin_within_the_least_number_of_tokens(tokenizer):
    assert text_of(tokenizer, ["a", "\n", "\n"], stop="\n\n", min_tokens=2) == ("a", 3)


def test_the_stop_string_is_part_of_the_text_if_asked_for(tokenizer):
    words = ["a", "b", "a", "b"]
    assert text_of(tokenizer, words, stop=["ba"], include_stop_str_in_output=True) == ("aba", 3)
    assert text_of(tokenizer, words, stop=["ba"]) == ("a", 3)


def test_special_tokens_are_written_out_if_asked_for(tokenizer):
    assert text_of(tokenizer, ["a", "<|end|>", "b"]) == ("ab", 3)
    assert text_of(tokenizer, ["a", "<|end|>", "b"], skip_special_tokens=False) == ("a<|end|>b", 3)


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "a<|end|>")])
def test_a_special_token_that_ends_the_text_is_part_of_it_if_it_is_a_stop_string_to_be_included(
    tokenizer, include, text
):
    sampling = SamplingParams(stop="<|end|>", include_stop_str_in_output=include)
    growing = IncrementalDetokenizer(tokenizer, sampling)
    growing.push(WORDS.index("a"))
    growing.stop_at(WORDS.index("<|end|>"))
    growing.finish()
    assert growing.text == text
