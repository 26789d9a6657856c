"""A model small enough to compile in seconds: a fixture's weights, with a tokenizer of single characters."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fineserve_jax.loaders import LoadedModel, Tokenizer
from fineserve_jax.loaders.hf_tokenizer import save_tokenizer

FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm2"
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"
SPECIAL = ["<unk>", "<s>", "</s>"]
# int4 needs int8 for its residuals, so that steps of both formats, in any mixture, are the same programs.
OPTIONS: dict[str, Any] = {
    "weights": "fp32",
    "kv_precision": "int4",
    "kv_memory": "8MiB",
    "max_batch_size": 4,
    "max_seq_len": 128,
    "max_chunk_tokens": 32,
}


def tiny_tokenizer(chat_template: str | None = CHAT, first: str = "!") -> Tokenizer:
    """96 tokens: three special ones, space, newline, and the characters from ! to {. `first`: what stands for !."""
    characters = ["Ġ", "Ċ", first, *(chr(code) for code in range(ord("!") + 1, ord("{") + 1))]
    vocabulary = {token: index for index, token in enumerate(SPECIAL + characters)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL])
    return Tokenizer(backend, (2,), chat_template=chat_template, special_tokens={"eos_token": "</s>"})


def write_tiny_model(directory: Path, chat_template: str | None = CHAT, first: str = "!") -> Path:
    """A Hugging Face directory."""
    shutil.copytree(FIXTURE, directory, ignore=shutil.ignore_patterns("expected.npz"))
    save_tokenizer(tiny_tokenizer(chat_template, first), directory)
    return directory


def with_nan(model: LoadedModel, token: int) -> LoadedModel:
    """The model with NaN in its embedding of a token, but not in its head."""
    config, embed = dataclasses.replace(model.config, tie_embeddings=False), model.params["embed"]
    spoilt = {**embed, "kernel": embed["kernel"].at[token, 0].set(np.nan)}
    return dataclasses.replace(model, config=config, params={**model.params, "embed": spoilt, "lm_head": embed})
