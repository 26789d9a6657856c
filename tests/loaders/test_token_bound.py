"""No text has fewer tokens than the bound says, whatever the tokenizer does to it."""

import unicodedata

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.loaders.token_bound import BYTE_TOKENS, token_bound

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(normalizer=None, added=()):
    """Runs of up to 8 spaces and of up to 4 `a` are tokens."""
    runs = ["ĠĠ", "ĠĠĠĠ", "ĠĠĠĠĠĠĠĠ", "aa", "aaaa"]
    merges = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("ĠĠĠĠ", "ĠĠĠĠ"), ("a", "a"), ("aa", "aa")]
    backend = tokenizers.Tokenizer(models.BPE({t: i for i, t in enumerate(ALPHABET + runs)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.add_special_tokens(list(added))
    return backend


def byte_fallback(**options):
    """As Llama's: spaces are written ▁, what is unknown in bytes."""
    vocabulary = ["<unk>", *BYTE_TOKENS, "▁", "a", "b", "▁▁", "▁a"]
    model = models.BPE({t: i for i, t in enumerate(vocabulary)}, [("▁", "▁"), ("▁", "a")], unk_token="<unk>", **options)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


BOUNDED = {
    "byte level": byte_level(),
    "NFC": byte_level(normalizers.NFC()),
    "NFKC": byte_level(normalizers.NFKC()),
    "NFD": byte_level(normalizers.NFD()),
    "lower case": byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "a token that swallows space": byte_level(added=[AddedToken("<|a|>", rstrip=True, lstrip=True)]),
    "a long normalized token": byte_level(normalizers.NFD(), [AddedToken("é" * 40, normalized=True)]),
    "byte fallback": byte_fallback(byte_fallback=True, fuse_unk=True),
    "unknown characters one by one": byte_fallback(),
}
PIECES = st.sampled_from(
    ["a", "aaaa", " ", " " * 30, "\n\t", "é", "e\u0301", "<|a|>", "é" * 40, "日", "😀", "ᾂ", "ﷺ", "각"]
)
TEXTS = st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join)


@pytest.mark.parametrize("name", BOUNDED)
@settings(max_examples=60)
@given(text=TEXTS)
@example("<|a|>" + " " * 5000 + "<|a|>")
@example(unicodedata.normalize("NFD", "\u1f82" * 300))
@example(" " * 8 * 50)
@example("é" * 400)
def test_the_bound_never_exceeds_the_tokens(name, text):
    backend = BOUNDED[name]
    bound = token_bound(backend)
    assert bound is not None
    tokens = backend.encode(text).ids
    assert bound.least_tokens(text) <= len(tokens)
    Tokenizer(backend, ()).encode(text, max_tokens=len(tokens))


def test_the_bound_is_reached():
    bound = token_bound(BOUNDED["byte level"])
    assert bound.least_tokens(" " * 8 * 50) == len(BOUNDED["byte level"].encode(" " * 8 * 50).ids) == 50
    assert token_bound(BOUNDED["NFC"]).least_tokens("a" * 80) == 10
    assert token_bound(BOUNDED["NFC"]).least_tokens("é" * 320) == 10


def truncating():
    backend = byte_level()
    backend.enable_truncation(4)
    return backend


def removing():
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()])
    return backend


@pytest.mark.parametrize(
    "backend",
    [
        truncating(),
        removing(),
        byte_level(normalizers.Strip()),
        byte_level(normalizers.Replace(tokenizers.Regex(" +"), " ")),
        byte_level(normalizers.Replace("aaa", "a")),
        byte_level(normalizers.Sequence([normalizers.Replace("a", "\u0301"), normalizers.NFC()])),
        byte_fallback(fuse_unk=True),
        tokenizers.Tokenizer(models.BPE({"a": 0}, [])),  # drops what is unknown
        tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        tokenizers.Tokenizer(models.Unigram([("a", 0.0)], 0, False)),
    ],
)
def test_there_is_no_bound_where_characters_may_vanish(backend):
    assert token_bound(backend) is None
    assert Tokenizer(backend, ()).encode("a" * 999, max_tokens=1)


def test_a_text_that_is_certainly_too_long_is_refused_before_it_is_tokenized():
    tokenizer = Tokenizer(BOUNDED["byte level"], ())
    assert len(tokenizer.encode(" " * 80, max_tokens=10)) == 10
    assert len(tokenizer.encode("b" * 80, max_tokens=10)) == 80  # not certain: whoever counts tokens refuses it
    message = (
        "^the prompt has 81 characters, which are at least 11 tokens; it may have 10; shorten it or raise max_seq_len"
    )
    with pytest.raises(RequestError, match=message):
        tokenizer.encode_prompt(" " * 81, max_tokens=10)
