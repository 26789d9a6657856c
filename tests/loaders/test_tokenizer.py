"""Tokenizers from GGUF metadata and from tokenizer.json; streaming decoding."""

import dataclasses
import json

import gguf
import pytest
from gguf_files import add_byte_tokenizer, finish
from hypothesis import given, settings
from hypothesis import strategies as st
from model_oracle import FIXTURES
from tokenizers import Tokenizer as Backend
from tokenizers import decoders
from tokenizers.models import BPE

from fineserve_jax.errors import ModelLoadError, RequestError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_tokenizer import hf_tokenizer, save_tokenizer
from fineserve_jax.loaders.tokenizer import Tokenizer

SPM = json.loads((FIXTURES / "sentencepiece.json").read_text(encoding="utf-8"))


def spm_gguf(path, **changes):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(changes.get("model", "llama"))
    writer.add_token_list(SPM["tokens"])
    if "scores" not in changes.get("leave_out", ()):
        writer.add_token_scores(SPM["scores"])
    writer.add_token_types(SPM["types"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    return GGUFFile(finish(writer, path))


def byte_gguf(path, pre="default", **flags):
    writer = gguf.GGUFWriter(path, "llama")
    add_byte_tokenizer(writer, pre=pre)
    for key, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return GGUFFile(finish(writer, path))


@pytest.fixture(scope="module")
def spm(tmp_path_factory):
    return gguf_tokenizer(spm_gguf(tmp_path_factory.mktemp("spm") / "t.gguf"))


@pytest.mark.parametrize("row", SPM["texts"], ids=range(len(SPM["texts"])))
def test_sentencepiece_vocabularies_encode_as_sentencepiece_does(spm, row):
    assert spm.encode(row["text"], add_special_tokens=False) == row["ids"]
    assert spm.decode(row["ids"]) == row["decoded"]


def test_sentencepiece_vocabularies_begin_with_bos_and_match_control_tokens(spm):
    assert spm.encode("the", add_special_tokens=True)[0] == spm.bos_token_id == 1
    assert 2 in spm.encode("the</s>", add_special_tokens=False)
    assert spm.eos_token_ids == (2,)
    assert spm.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("default", ["I", "'ll", "Ġpay", "Ġ12345", "ĠDON", "'", "T", "Ċ", "Ċ", "x"]),
        ("smollm", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "ĠDON", "'", "T", "Ċ", "Ċ", "x"]),
        ("llama-bpe", ["I", "'ll", "Ġpay", "Ġ", "123", "45", "ĠDON", "'T", "ĊĊ", "x"]),
        ("qwen2", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "5", "ĠDON", "'T", "ĊĊ", "x"]),
    ],
)
def test_pre_tokenizers_split_as_their_models_were_trained(tmp_path, pre, pieces):
    backend = gguf_tokenizer(byte_gguf(tmp_path / "t.gguf", pre)).backend
    split = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("I'll pay 12345 DON'T\n\nx")]
    assert split == pieces


def test_control_tokens_in_text_become_their_ids_and_vanish_in_output(tmp_path):
    tokenizer = gguf_tokenizer(byte_gguf(tmp_path / "t.gguf"))
    ids = tokenizer.encode("he<|end|>x", add_special_tokens=True)
    assert ids == [92, 93, ord("x") - 33]
    assert tokenizer.decode(ids) == "hex"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "he<|end|>x"
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.token_text(92)) == (96, (93,), "he")


@pytest.mark.parametrize(
    ("pre", "flags", "expected"),
    [
        ("default", {}, [92]),
        ("default", {"add_bos_token": True}, [94, 92]),
        ("default", {"add_bos_token": True, "add_eos_token": True}, [94, 92, 93]),
        ("llama-bpe", {}, [94, 92]),
        ("llama-bpe", {"add_bos_token": False}, [92]),
    ],
)
def test_sequence_ends_follow_the_file_and_its_formats_defaults(tmp_path, pre, flags, expected):
    tokenizer = gguf_tokenizer(byte_gguf(tmp_path / "t.gguf", pre, **flags))
    assert tokenizer.encode("he", add_special_tokens=True) == expected
    assert tokenizer.encode("he", add_special_tokens=False) == [92]


def test_unsupported_tokenizers_are_refused_by_name(tmp_path):
    with pytest.raises(ModelLoadError, match=r"kind 'bert'.*supported: gpt2, gemma4, llama"):
        gguf_tokenizer(spm_gguf(tmp_path / "a.gguf", model="bert"))
    with pytest.raises(ModelLoadError, match=r"pre-tokenizer 'own'.*supported: a\.x-4\.0, afmoe.*tekken"):
        gguf_tokenizer(byte_gguf(tmp_path / "b.gguf", "own"))
    with pytest.raises(ModelLoadError, match=r"no tokenizer scores"):
        gguf_tokenizer(spm_gguf(tmp_path / "c.gguf", leave_out=("scores",)))


def test_a_saved_tokenizer_loads_as_the_same(tmp_path, spm):
    stored = Tokenizer(spm.backend, (2, 7), 1, "{{ messages }}", spm.special_tokens)
    save_tokenizer(stored, tmp_path)
    loaded = hf_tokenizer(tmp_path)
    for row in SPM["texts"]:
        assert loaded.encode(row["text"]) == stored.encode(row["text"])
    found = (loaded.eos_token_ids, loaded.bos_token_id, loaded.chat_template, loaded.special_tokens)
    assert found == ((2, 7), 1, "{{ messages }}", spm.special_tokens)


def test_end_tokens_come_from_every_file_and_end_of_turn_tokens(tmp_path):
    tokenizer = gguf_tokenizer(byte_gguf(tmp_path / "t.gguf"))
    tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "h"}, "bos_token": "<|start|>"}')
    loaded = hf_tokenizer(tmp_path)
    assert loaded.eos_token_ids == (5, 6, 7, ord("h") - 33, 93)
    assert loaded.bos_token_id == 94


@pytest.mark.parametrize("form", ["file", "string", "named", "none"])
def test_chat_templates_are_found_wherever_they_are_kept(tmp_path, spm, form):
    spm.backend.save(str(tmp_path / "tokenizer.json"))
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    stated = {"file": "ignored", "string": "D", "named": named, "none": None}[form]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
    if form == "file":
        (tmp_path / "chat_template.jinja").write_text("D")
    assert hf_tokenizer(tmp_path).chat_template == (None if form == "none" else "D")


def test_several_chat_templates_keep_their_names(tmp_path, spm):
    stored = dataclasses.replace(spm, chat_template="D", chat_templates={"rag": "R", "tool_use": "T"})
    save_tokenizer(stored, tmp_path)
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R2")
    loaded = hf_tokenizer(tmp_path)
    assert (loaded.chat_template, loaded.chat_templates) == ("D", {"rag": "R2", "tool_use": "T"})


def test_truncation_and_padding_of_training_do_not_reach_prompts(tmp_path, spm):
    trained = Backend.from_str(spm.backend.to_str())
    trained.enable_truncation(4)
    trained.enable_padding(length=4)
    trained.save(str(tmp_path / "tokenizer.json"))
    loaded = hf_tokenizer(tmp_path)
    assert len(loaded.encode("the harbour master kept a ledger")) > 4
    assert len(loaded.encode("a", add_special_tokens=False)) < 4


def test_a_missing_or_broken_tokenizer_json_is_refused(tmp_path):
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        hf_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        hf_tokenizer(tmp_path)


def _one_token_per_byte():
    """Byte-level tokens 0..255 in byte order, and the special token 256."""
    encoder = decoders.ByteLevel()
    alphabet = _byte_alphabet()
    backend = Backend(BPE(vocab={char: byte for byte, char in enumerate(alphabet)}, merges=[]))
    backend.decoder = encoder
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, (256,))


def _byte_alphabet():
    """GPT-2's printable stand-ins: printable bytes stand for themselves, the others for U+0100 onwards."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


BYTES = _one_token_per_byte()


@given(st.text(max_size=30))
@settings(max_examples=30)
def test_streamed_pieces_are_whole_characters_and_join_to_the_text(text):
    stream = BYTES.stream()
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.flush() == text
    ends, so_far = set(), ""
    for character in text:
        so_far += character
        ends.add(len(so_far.encode()))
    assert all((index + 1 in ends) == bool(piece) for index, piece in enumerate(pieces) if text.isascii())
    assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(st.lists(st.integers(0, 256), max_size=30))
@settings(max_examples=100)
def test_streaming_any_tokens_gives_what_decoding_all_gives(ids):
    stream = BYTES.stream()
    streamed = "".join([stream.push(token) for token in ids]) + stream.flush()
    assert streamed == BYTES.decode(ids)


def test_spaces_of_sentencepiece_survive_streaming(spm):
    ids = SPM["texts"][4]["ids"]
    stream = spm.stream()
    assert "".join(stream.push(token) for token in ids) + stream.flush() == SPM["texts"][4]["decoded"]


def test_an_unfinished_character_is_only_sent_at_the_end():
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "é🙂".encode()[:-1]] == ["", "é", "", "", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_text_that_is_not_valid_unicode_is_refused_with_its_place(spm):
    with pytest.raises(RequestError, match=r"not valid Unicode: character 3 is '\\udce9'"):
        spm.encode("caf\udce9")
    with pytest.raises(RequestError, match=r"not valid Unicode"):
        spm.encode_prompt("caf\udce9")


def test_a_bos_does_not_make_a_prompt_of_an_empty_text(spm):
    assert spm.encode("") == [spm.bos_token_id]
    with pytest.raises(RequestError, match=r"the prompt is empty; give at least one token"):
        spm.encode_prompt("")
    assert spm.encode_prompt("the") == spm.encode("the", add_special_tokens=True)
