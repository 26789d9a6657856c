"""Text of growing sequences: as it comes, in linear time, and joined to what it continues."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE, WordPiece

from fineserve_jax.loaders import Tokenizer
from fineserve_jax.loaders.stream_decoder import WindowStreamDecoder
from fineserve_jax.loaders.token_bytes import byte_rule

WORDS = ["<unk>", "<s>", "▁the", "▁sky", "▁", "a", "▁b", *(f"<0x{byte:02X}>" for byte in range(256))]
LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def make_tokenizer(decoder, words=WORDS):
    backend = Backend(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    backend.decoder = decoder
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, ())


def id_of(*words):
    return [WORDS.index(word) for word in words]


def streamed(tokenizer, ids, **how):
    stream = tokenizer.stream(**how)
    return [stream.push(token) for token in ids] + [stream.flush()]


SPM = make_tokenizer(LLAMA)


def test_a_continuation_keeps_its_leading_space():
    assert "".join(streamed(SPM, id_of("▁sky"))) == "sky"
    assert "".join(streamed(SPM, id_of("▁sky"), prompt_ids=id_of("<s>", "▁the"))) == " sky"
    assert "".join(streamed(SPM, id_of("▁sky"), prompt_ids=id_of("<s>"))) == "sky"


def test_special_tokens_have_text_only_where_it_is_asked_for():
    ids = id_of("a", "<s>", "a")
    assert "".join(streamed(SPM, ids)) == "aa"
    assert "".join(streamed(SPM, ids, skip_special_tokens=False)) == "a<s>a"


@given(st.text(max_size=20), st.lists(st.sampled_from(["▁the", "▁", "a", "▁b"]), max_size=8))
@settings(max_examples=100)
def test_what_is_streamed_is_what_is_decoded(text, words):
    ids = [*id_of(*words), *(WORDS.index(f"<0x{byte:02X}>") for byte in text.encode()), *id_of("a")]
    assert "".join(streamed(SPM, ids)) == SPM.decode(ids)


def test_bytes_that_are_no_text_are_sent_at_once():
    ids = id_of("<0xFF>") * 1000
    assert streamed(SPM, ids)[:-1] == ["\ufffd"] * 1000


@pytest.mark.parametrize(
    ("decoder", "entry", "expected"),
    [
        (LLAMA, "▁sky", b" sky"),
        (LLAMA, "<0xE2>", b"\xe2"),
        (decoders.ByteLevel(), "Ġsky", b" sky"),
        (decoders.ByteLevel(), "âĤ", b"\xe2\x82"),
        (decoders.ByteLevel(), "<|é 中|>", "<|é 中|>".encode()),
        (decoders.Metaspace(), "▁sky", b" sky"),
    ],
)
def test_tokens_are_told_apart_by_their_bytes(decoder, entry, expected):
    tokenizer = make_tokenizer(decoder, ["<s>", entry])
    assert tokenizer.token_bytes(1) == expected
    assert tokenizer.token_bytes(10**6) == b""


def test_decoders_that_look_at_several_tokens_have_no_bytes_of_their_own():
    backend = Backend(WordPiece({"un": 0, "##able": 1, "able": 2}))
    backend.decoder = decoders.WordPiece()
    assert byte_rule(backend) is None
    tokenizer = Tokenizer(backend, ())
    assert "".join(streamed(tokenizer, [0, 1, 2])) == "unable able"
    assert "".join(streamed(tokenizer, [2], prompt_ids=[0, 1])) == " able"
    assert tokenizer.token_bytes(2) == b"able"


@pytest.mark.parametrize("text", ["\ufffd", ""], ids=["broken", "skipped"])
def test_a_window_stays_short_whatever_comes(text):
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return text * len(ids)

    stream = WindowStreamDecoder(decode)
    pieces = [stream.push(0) for _ in range(1000)]
    assert longest <= WindowStreamDecoder.MOST_CONTEXT + WindowStreamDecoder.MOST_PENDING
    assert len("".join(pieces)) >= len(text) * (1000 - WindowStreamDecoder.MOST_PENDING)
