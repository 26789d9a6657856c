"""A model that is made for vectors of texts, in files of sentence-transformers: a fixture without its output head."""

import json
import shutil
import string
from pathlib import Path
from typing import Any

import tokenizers
from model_oracle import FIXTURES, case_config, case_tensors
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

from fineserve_jax.loaders import Tokenizer
from fineserve_jax.loaders.hf_tokenizer import save_tokenizer

CASE = "qwen3"
END, CHARACTERS = 0, ["<end>", *string.printable[:95]]
PACKAGE = "sentence_transformers.models."
LAST, MEAN = {"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, {"pooling_mode_mean_tokens": True}


def write_embedding_model(directory: Path, pooling: dict[str, Any], *further: str, **config: Any) -> Path:
    """The directory.

    pooling: its Pooling's settings. further: classes of the modules behind that. config: what is otherwise in
    config.json.

    Tensors are called as in a model without a head, and texts are ended by a token, as those of Qwen3-Embedding.
    """
    shutil.copytree(FIXTURES / CASE, directory)
    stored = {name.removeprefix("model."): tensor for name, tensor in case_tensors(CASE).items()}
    save_file({name: t for name, t in stored.items() if name != "lm_head.weight"}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(case_config(CASE) | config))
    backend = tokenizers.Tokenizer(models.WordLevel({text: i for i, text in enumerate(CHARACTERS)}, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.add_special_tokens(["<end>"])
    backend.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    save_tokenizer(Tokenizer(backend, eos_token_ids=(END,)), directory)
    kinds = ["Transformer", "Pooling", *further]
    folders = ["", *(f"{i}_{kind}" for i, kind in enumerate(kinds) if i)]
    entries = [{"idx": i, "path": f, "type": PACKAGE + k} for i, (k, f) in enumerate(zip(kinds, folders, strict=True))]
    (directory / "modules.json").write_text(json.dumps(entries))
    (directory / "1_Pooling").mkdir()
    written = {"word_embedding_dimension": 64, "include_prompt": True, "pooling_mode_cls_token": False} | pooling
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(written))
    return directory
