"""Vocabularies of GGUF files: how SentencePiece pieces are joined, how text is split, and which tokens are special."""

import itertools

import gguf
import pytest
from gguf_files import add_byte_tokenizer, finish
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.checkpoint import save_checkpoint
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_sentencepiece import merges_of_scores
from fineserve_jax.loaders.gguf_splitting import SPLITTINGS
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.loaded_model import LoadedModel
from fineserve_jax.loaders.token_bytes import byte_alphabet

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
RUNS = [*range(1, 15), 16]  # spaces in a row that are a piece in Mistral's vocabularies, all with one score
WORDS = ["▁a", "▁b", "ab", "▁ab", "aa", "▁▁a", "aba", "ba"]
PIECES = ["<unk>", "<s>", "</s>", *BYTES, *["▁" * run for run in RUNS], *WORDS, "a", "b"]
SCORES = {word: -float(rank) for rank, word in enumerate(WORDS)} | {"▁" * run: -1e9 for run in RUNS}
TYPES = [2, 3, 3, *[6] * 256, *[1] * (len(RUNS) + len(WORDS) + 2)]


def pieces_gguf(path, pieces=PIECES, types=TYPES, name=None, architecture="llama", **flags):
    writer = gguf.GGUFWriter(path, architecture)
    if name is not None:
        writer.add_name(name)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([SCORES.get(piece, -1e9) for piece in pieces])
    writer.add_token_types(types)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return gguf_tokenizer(GGUFFile(finish(writer, path)))


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return pieces_gguf(tmp_path_factory.mktemp("spm") / "t.gguf")


def best_pairs_joined(text):
    """SentencePiece's own rule: the neighbours that make the best piece are joined, of equal ones the leftmost."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(SCORES[a + b], -at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in SCORES]
        if not pairs:
            return parts
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(st.text(st.sampled_from("ab "), min_size=1, max_size=40))
@settings(max_examples=200, deadline=None)
def test_pieces_are_joined_as_sentencepiece_joins_them_also_where_scores_are_equal(mistral, text):
    ids = mistral.encode(text, add_special_tokens=False)
    assert [PIECES[index] for index in ids] == best_pairs_joined(text)


def test_runs_of_spaces_are_as_long_as_the_vocabulary_allows(mistral):
    for count in range(1, 20):
        ids = mistral.encode(" " * count, add_special_tokens=False)
        spaces = count + 1  # a text begins with another one
        first = max(run for run in RUNS if run <= spaces)
        assert [len(PIECES[index]) for index in ids] == [first, *([spaces - first] if spaces > first else [])]


def test_merges_come_by_score_then_by_the_length_of_their_parts():
    vocabulary = {piece: index for index, piece in enumerate(["a", "aa", "aaa", "b", "ab"])}
    merges = merges_of_scores(vocabulary, [0.0, -5.0, -5.0, 0.0, -1.0], first=())
    assert merges == [("a", "b"), ("aa", "a"), ("a", "aa"), ("a", "a")]
    assert merges_of_scores(vocabulary, [0.0, -5.0, -5.0, 0.0, -1.0], first={1})[0] == ("a", "a")


def test_special_tokens_in_a_text_are_one_id_and_what_follows_begins_anew(mistral):
    ids = mistral.encode("a</s> b<unk>ab", add_special_tokens=False)
    assert [PIECES[index] for index in ids] == ["▁a", "</s>", "▁", "▁b", "<unk>", "▁ab"]


def test_a_vocabulary_that_names_no_ends_has_sentencepieces(mistral):
    assert (mistral.bos_token_id, mistral.eos_token_ids) == (1, (2,))
    assert mistral.special_tokens == {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    assert mistral.encode("a") == [1, PIECES.index("▁a")]


def test_user_defined_runs_of_spaces_are_found_though_files_write_them_with_spaces(tmp_path):
    """As Gemma's files have them; the longest goes first, and each keeps its text."""
    pieces = ["<unk>", "<s>", "</s>", *BYTES, "▁", "  ", "   ", "\n", "\n\n", "<h1>", "▁a", "a"]
    types = [2, 3, 3, *[6] * 256, 1, 4, 4, 4, 4, 4, 1, 1]
    tokenizer = pieces_gguf(tmp_path / "t.gguf", pieces, types, add_space_prefix=False)
    text = "a    a  a \n\n\n<h1>  "
    ids = tokenizer.encode(text, add_special_tokens=False)
    found = [pieces[index] for index in ids]
    assert found == ["a", "   ", "▁a", "  ", "a", "▁", "\n\n", "\n", "<h1>", "  "]
    assert tokenizer.decode(ids) == text
    assert "".join(map(tokenizer.stream().push, ids)) == text


def test_phi3s_special_tokens_take_the_space_behind_them(tmp_path):
    pieces = [*PIECES, "<|end|>", "<|endoftext|>"]
    types = [*TYPES, 3, 3]
    for architecture, name, spaces in (
        ("llama", "Phi 3 Mini", 2),
        ("llama", "Phi-3-mini-4k-instruct", 0),
        ("phi3", "Phi 3 Mini", 0),
    ):
        tokenizer = pieces_gguf(tmp_path / "t.gguf", pieces, types, name=name, architecture=architecture)
        ids = tokenizer.encode("<|end|>\n a<|endoftext|> ", add_special_tokens=False)
        assert [pieces[index] for index in ids][-3:] == ["▁a", "<|endoftext|>", "▁▁"]
        assert len(ids) == 4 + (2 if spaces else 0)


TEXT = "I'll DON'T  12345 abCD日本 \n\n  a1b\t你好ab,cd 1234567 e\u0301क्ष\r\n!/ x\u00a0\u3000y"


@pytest.mark.parametrize("name", sorted(SPLITTINGS))
def test_splitting_loses_nothing(name):
    pre_tokenizer = SPLITTINGS[name].pre_tokenizer()
    if pre_tokenizer is None:
        assert not SPLITTINGS[name].in_bytes
        return
    letters = "".join(piece for piece, _ in pre_tokenizer.pre_tokenize_str(TEXT))
    alphabet = byte_alphabet()
    assert bytes(alphabet[letter] for letter in letters).decode() == TEXT


@pytest.mark.parametrize(
    ("names", "text", "pieces"),
    [
        (("deepseek-v3", "hunyuan-dense"), "ab1234 你好x !", "ab 123 4 _ 你好 x _!"),
        (("deepseek-llm", "deepseek-coder"), "ab12 你好x\n\n", "ab 1 2 _ 你好 x $ $"),
        (("tekken",), "abCD 12's", "ab CD _ 1 2 's"),
        (("gpt-4o", "llama4"), "abCD 1234's don't", "ab CD _ 123 4 's _don't"),
        (("falcon",), "a+b 12345", "a + b _ 123 45"),
        (("command-r", "starcoder", "refact"), "a 123", "a _ 1 2 3"),
        (("viking",), "don't 12.", "don't _ 1 2 ."),
        (("bloom", "poro-chat"), "don't 12.", "don't _12 ."),
        (("superbpe", "afmoe", "tiny_aya"), "1234567", "1 234 567"),
        (("dbrx", "glm4", "smaug-bpe", "llama-bpe", "jais-2"), "1234567", "123 456 7"),
        (("qwen2", "stablelm2", "hunyuan", "seed-coder", "bailingmoe"), "1234", "1 2 3 4"),
        (("ufakzeka",), "ali'nin I've", "ali 'nin _I 've"),
        (("ufakzeka",), "don't'll2", "don 't 'll 2"),
        (("qwen35",), "क्ष x", "क्ष _x"),
        (("qwen2",), "क्ष", "क ्ष"),
        (("kimi-k2",), "ab你好cd", "ab 你好 cd"),
        (("exaone-moe",), "ab cd ef 1", "ab_cd_ef _ 1"),
        (("chameleon",), "a    b. 12", "a ____ b . _ 1 2"),
        (("spark2_5",), "a\n\nb 12", "a $ $ b _ 1 2"),
        (("minicpm5",), "1234567", "123 456 7"),
        (("gpt-2", "mpt", "olmo", "jais", "default"), "don't 12345", "don 't _12345"),
    ],
)
def test_text_is_split_as_each_name_says(names, text, pieces):
    """A piece's "_" stands for a space, its "$" for a line break."""
    alphabet = byte_alphabet()
    for name in names:
        found = SPLITTINGS[name].pre_tokenizer().pre_tokenize_str(text)
        spelt = [bytes(alphabet[letter] for letter in piece).decode() for piece, _ in found]
        assert " ".join(piece.replace(" ", "_").replace("\n", "$") for piece in spelt) == pieces


def test_vocabularies_in_characters_join_across_spaces_and_fall_back_to_bytes(tmp_path):
    pieces = ["<unk>", "<bos>", "<eos>", *BYTES, "▁", "a", "b", "▁a", "▁a▁", "a▁b", "  ", "\n"]
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(pieces)
    writer.add_token_types([2, 3, 3, *[6] * 256, 1, 1, 1, 1, 1, 1, 4, 4])
    writer.add_token_merges(["▁ ▁", "▁ a", "▁a ▁"])
    writer.add_bos_token_id(1)
    tokenizer = gguf_tokenizer(GGUFFile(finish(writer, tmp_path / "t.gguf")))
    ids = tokenizer.encode(" a  b\né")
    assert [pieces[index] for index in ids] == ["<bos>", "▁a", "  ", "b", "\n", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == " a  b\né"


@pytest.mark.parametrize(("texts", "ends"), [(["<|end|>"], [0]), (["<|end|>", "<|return|>", "<|call|>"], [1, 2])])
def test_a_messages_end_is_no_turns_end_where_turns_have_several(tmp_path, texts, ends):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-4o")
    writer.add_token_list([*texts, "a", "aa"])
    writer.add_token_types([3] * len(texts) + [1, 1])
    writer.add_token_merges(["a a"])
    tokenizer = gguf_tokenizer(GGUFFile(finish(writer, tmp_path / "t.gguf")))
    assert sorted(tokenizer.eos_token_ids) == ends


def test_a_tokenizer_that_would_be_another_after_conversion_is_not_written(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    add_byte_tokenizer(writer)
    tokenizer = gguf_tokenizer(GGUFFile(finish(writer, tmp_path / "t.gguf")))
    tokenizer.backend.enable_truncation(3)  # which a directory's tokenizer.json never keeps
    with pytest.raises(
        ModelLoadError,
        match=r"would encode '     ' as \[95, 95, 95, 95, 95\], the original gives \[95, 95, 95\]; nothing was",
    ):
        save_checkpoint(LoadedModel("m", None, {}, tokenizer, "fp32"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
