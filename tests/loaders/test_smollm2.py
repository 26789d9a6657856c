"""The real model: tokenizer, chat template and greedy decisions equal those of Hugging Face transformers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_oracle import FIXTURES, causal_attend

from fineserve_jax.loaders import ChatOptions, fetch, load_model, render_chat
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.models import build_model

pytestmark = pytest.mark.real_model

TOKENIZER = json.loads((FIXTURES / "smollm2_tokenizer.json").read_text(encoding="utf-8"))
GREEDY = json.loads((FIXTURES / "smollm2_greedy.json").read_text(encoding="utf-8"))["prompts"]
CLEAR_MARGIN = 1e-3  # logits closer than this are a tie that rounding may break either way


@pytest.fixture(scope="module")
def tokenizer():
    return gguf_tokenizer(GGUFFile(fetch("smollm2-135m")))


def test_texts_encode_and_decode_as_in_transformers(tokenizer):
    for row in TOKENIZER["texts"]:
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]
        assert tokenizer.decode(row["ids"]) == row["decoded"]
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in row["ids"]) + stream.flush() == row["decoded"]


def test_chats_render_as_in_transformers(tokenizer):
    for row in TOKENIZER["chats"]:
        assert render_chat(tokenizer, row["messages"], ChatOptions(add_generation_prompt=row["prompt"])) == row["text"]


def test_generation_stops_at_the_end_of_a_turn(tokenizer):
    assert [tokenizer.token_text(i) for i in tokenizer.eos_token_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert (tokenizer.bos_token_id, tokenizer.vocab_size) == (1, 49152)


def test_fixture_prompts_cover_short_and_long():
    lengths = sorted(len(row["prompt_token_ids"]) for row in GREEDY)
    assert (len(GREEDY), lengths[0], lengths[-1] > 250) == (24, 3, True)


def _bins(rows, size):
    """Whole sequences packed into flat axes of `size` tokens, first fit."""
    bins = []
    for row in sorted(rows, key=lambda r: -len(r["prompt_token_ids"])):
        sequence = row["prompt_token_ids"] + row["token_ids"][:-1]
        home = next((b for b in bins if sum(len(s) for _, s in b) + len(sequence) <= size), None)
        if home is None:
            bins.append(home := [])
        home.append((row, sequence))
    return bins


def test_greedy_tokens_equal_those_of_transformers_in_float32():
    """Each continuation is scored in one pass: at every step its token must be the model's own choice."""
    model = load_model("smollm2-135m", "fp32")
    module, size = build_model(model.config, "fp32"), 512

    @jax.jit
    def best(params, tokens, positions, sequence):
        attend = causal_attend(model.config, positions, sequence)
        hidden = module.apply({"params": params}, tokens, positions, attend)
        return jnp.argmax(module.apply({"params": params}, hidden, method="logits"), axis=-1)

    compared, rows = 0, GREEDY[::2]  # half of them for time; the engine's own test takes all
    for packed in _bins(rows, size):
        tokens = np.zeros(size, np.int32)
        positions, sequence = np.zeros(size, np.int32), np.full(size, -1, np.int32)
        spans, at = [], 0
        for index, (row, ids) in enumerate(packed):
            span = slice(at, at + len(ids))
            tokens[span], positions[span], sequence[span] = ids, np.arange(len(ids)), index
            spans.append((row, at + len(row["prompt_token_ids"]) - 1))
            at += len(ids)
        chosen = np.asarray(best(model.params, tokens, positions, sequence))
        for row, first in spans:
            clear = np.array(row["margins"]) > CLEAR_MARGIN
            found = chosen[first : first + len(row["token_ids"])]
            np.testing.assert_array_equal(found[clear], np.array(row["token_ids"])[clear], err_msg=row["text"])
            compared += int(clear.sum())
    assert compared >= len(rows) * 48 - 5
