"""The model as each peer reads it, made from one GGUF file, so that all have the same weights.

Widening is exact: a file in bf16 holds the stored 4-bit values but for bf16's rounding, and so does ours.
"""

import subprocess
from pathlib import Path

from benchmarks.peers.environments import python_of
from fineserve_jax.loaders.fetch import cache_directory

TO_CHECKPOINT = """
import sys, torch
from transformers import AutoModelForCausalLM
source, target = sys.argv[1:]
folder, _, name = source.rpartition("/")
loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
loaded.config.__dict__.pop("quantization_config", None)  # one that says GGUF cannot be saved, though it is widened
model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.bfloat16)
model.load_state_dict(loaded.state_dict())
model.save_pretrained(target)
"""
TO_GGUF = """
import ctypes, sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind.upper()), True
sys.exit(llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)))
"""


def checkpoint(gguf: Path) -> Path:
    """A Hugging Face directory in bf16."""
    target = _folder() / f"{gguf.stem}-bf16"
    if not (target / "config.json").exists():
        _make("transformers", TO_CHECKPOINT, str(gguf), str(target))
    return target


def requantized(gguf: Path, kind: str) -> Path:
    """A GGUF file with matrices in `kind`: q4_1, q8_0, bf16; the file itself if it is kept so."""
    if gguf.stem.lower().endswith(kind):
        return gguf
    target = _folder() / f"{gguf.stem}-as-{kind}.gguf"
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        _make("llama", TO_GGUF, str(gguf), str(unfinished), kind)
        unfinished.replace(target)
    return target


def _folder() -> Path:
    folder = cache_directory() / "peers" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _make(environment: str, script: str, *arguments: str) -> None:
    done = subprocess.run([str(python_of(environment)), "-c", script, *arguments], capture_output=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{arguments[1]} could not be made:\n{done.stderr.decode(errors='replace')[-2000:]}")
