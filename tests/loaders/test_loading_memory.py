"""Loading takes little more memory than what is loaded, for every kind of checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import add_byte_tokenizer, finish
from quantized_cases import CASES, write_checkpoint
from safetensors.numpy import save_file

from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_tokenizer import save_tokenizer

HERE = Path(__file__).parent
ENV = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")

HIDDEN, MLP, HEADS, LAYERS, VOCAB = 1024, 4096, 16, 6, 32768
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
MATRICES = {
    **{f"self_attn.{part}_proj": (f"attn_{part}", HIDDEN, HIDDEN) for part in "qkv"},
    "self_attn.o_proj": ("attn_output", HIDDEN, HIDDEN),
    **{f"mlp.{part}_proj": (f"ffn_{part}", MLP, HIDDEN) for part in ("gate", "up")},
    "mlp.down_proj": ("ffn_down", HIDDEN, MLP),
}
LAYER_VALUES = sum(out * inner for _, out, inner in MATRICES.values())


def write_gguf(path):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    add_byte_tokenizer(writer)
    norm, kind = np.ones(HIDDEN, np.float32), gguf.GGMLQuantizationType.Q8_0
    shapes = {"token_embd": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": (out, inner) for name, out, inner in MATRICES.values()}
        writer.add_tensor(f"blk.{layer}.attn_norm.weight", norm)
        writer.add_tensor(f"blk.{layer}.ffn_norm.weight", norm)
    writer.add_tensor("output_norm.weight", norm)
    for name, (out, inner) in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros((out, inner // 32 * 34), np.uint8), raw_dtype=kind)
    finish(writer, path)
    return path


def write_hf(folder, encode, settings):
    """encode: tensors, by the ends of their names, of a matrix of a shape."""
    folder.mkdir()
    norm = np.ones(HIDDEN, np.float16)
    tensors = {"model.embed_tokens.weight": np.zeros((VOCAB, HIDDEN), np.float16), "model.norm.weight": norm}
    for layer in range(LAYERS):
        for name, (_, out, inner) in MATRICES.items():
            prefix = f"model.layers.{layer}.{name}."
            tensors |= {prefix + end: tensor for end, tensor in encode(out, inner).items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = norm
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": settings}))
    save_file(tensors, folder / "model.safetensors")
    return with_tokenizer(folder)


def with_tokenizer(folder):
    writer = gguf.GGUFWriter(folder / "tokenizer.gguf", "llama")
    add_byte_tokenizer(writer)
    save_tokenizer(gguf_tokenizer(GGUFFile(finish(writer, folder / "tokenizer.gguf"))), folder)
    return folder


def plain(out, inner):
    return {"weight": np.zeros((out, inner), np.float16)}


def awq(out, inner):
    groups = inner // 128
    packed = {"qweight": (inner, out // 8), "qzeros": (groups, out // 8)}
    return {
        **{end: np.zeros(shape, np.int32) for end, shape in packed.items()},
        "scales": np.ones((groups, out), np.float16),
    }


def fp8(out, inner):
    return {
        "weight": np.zeros(
            (out, inner), CASES["fp8, blocks"].matrix(np.random.default_rng(0), 8, 8)[0]["weight"].dtype
        ),
        "weight_scale_inv": np.ones((out // 128, inner // 128), np.float32),
    }


def converted(model, weights):
    """The directory that `convert` makes of it, in a process of its own."""
    folder = model.parent / f"{model.name} converted"
    convert = "import sys; from fineserve_jax.entrypoints.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", convert, "convert", model, folder, "--weights", weights], check=True, env=ENV)
    return folder


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def case(name, write, weights, value_bytes, *marks):
    return pytest.param(write, weights, value_bytes, id=name, marks=marks)


@pytest.mark.parametrize(
    ("write", "weights", "value_bytes"),
    [
        case("awq to bf16", lambda folder: write_hf(folder / "m", awq, AWQ), "bf16", 2),
        case("gguf to int8", lambda folder: write_gguf(folder / "m.gguf"), "int8", 1),
        case("gguf to fp32", lambda folder: write_gguf(folder / "m.gguf"), "fp32", 4, pytest.mark.slow),
        case("float16 to bf16", lambda folder: write_hf(folder / "m", plain, None), "bf16", 2, pytest.mark.slow),
        case(
            "int8, converted",
            lambda folder: converted(write_gguf(folder / "m.gguf"), "int8"),
            "int8",
            1,
            pytest.mark.slow,
        ),
        case("fp8 to int8", lambda folder: write_hf(folder / "m", fp8, FP8), "int8", 1, pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_memory_than_its_result(tmp_path, write, weights, value_bytes):
    """At most 1.2 times the result and a layer more."""
    path = write(tmp_path)
    small = with_tokenizer(write_checkpoint(tmp_path / "small", CASES["awq"])[0])
    if path.name.endswith("converted"):
        small = converted(small, weights)
    command = [sys.executable, HERE / "loading_memory.py", path, weights, small]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr
    most, held = map(int, done.stdout.split())
    assert held >= 0.95 * value_bytes * (LAYERS * LAYER_VALUES + VOCAB * HIDDEN)
    assert most <= 1.2 * held + value_bytes * LAYER_VALUES, f"{most / 1e6:.0f} MB for {held / 1e6:.0f} MB"
