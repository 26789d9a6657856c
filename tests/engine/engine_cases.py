"""A tiny random model whose tokens are the printable characters, and a loop that serves requests."""

import dataclasses
import string
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from fineserve_jax.engine.engine import Engine
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import LoadedModel, Tokenizer
from fineserve_jax.models import ModelConfig, random_params
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

CHARACTERS = ["<end>", *string.printable[:95]]
EOS = 0
# What engines of these tests have if a test does not say otherwise, so that they share compiled programs.
SETTINGS: dict[str, Any] = {
    "max_seq_len": 256,
    "max_batch_size": 8,
    "max_chunk_tokens": 64,
    "kv_memory": "8MiB",
    "kv_formats": ("fp32", "bf16", "int8", "int4"),  # each adds a loop to every program
}


def character_tokenizer() -> Tokenizer:
    vocabulary = {text: i for i, text in enumerate(CHARACTERS)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, eos_token_ids=(EOS,))


def random_model(name: str = "tiny", weights: str = "fp32", **shape: Any) -> LoadedModel:
    config = ModelConfig(
        **{
            "family": "llama",
            "vocab_size": len(CHARACTERS),
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 32,
            "intermediate_size": 96,
            "rope_theta": 10000.0,
            "norm_eps": 1e-5,
            "tie_embeddings": False,
            "max_position": 512,
            **shape,
        }
    )
    return LoadedModel(name, config, random_params(config, weights, seed=7, scale=0.2), character_tokenizer(), weights)


def with_nan(model: LoadedModel, token: int) -> LoadedModel:
    """The model with NaN in its embedding of a token."""
    embed = model.params["embed"]
    spoilt = {**embed, "kernel": embed["kernel"].at[token, 0].set(np.nan)}
    return dataclasses.replace(model, params={**model.params, "embed": spoilt})


def serve(
    engine: Engine,
    prompts: list[list[int]],
    formats: list[str],
    sampling: SamplingParams,
    models: list[str] | None = None,
) -> list[Request]:
    """Serves prompts to the end, checking the books after every step."""
    requests = [
        engine.add_request(prompt, sampling, RequestOptions(kv_precision=name, model=model))
        for prompt, name, model in zip(prompts, formats, models or [None] * len(prompts), strict=True)
    ]
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    return requests


def check_nothing_is_left(llm: LLM) -> None:
    """Nobody is served, and nothing is left of those who were."""
    engine = llm.engine
    assert not engine.has_unfinished
    assert engine.detokenizers == {}
    assert not engine.kv.held
    check_integrity(engine.kv)
