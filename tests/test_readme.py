"""What the README shows works."""

import importlib.util
import re
from pathlib import Path

from fineserve_jax.pallas_kernels import formats
from fineserve_jax.pallas_kernels.formats import FORMATS, PageVectors, PageWords, TokenFormat, get_format
from fineserve_jax.scheduler import POLICIES

ROOT = Path(__file__).parents[1]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_format_and_the_policy_of_the_readme_can_be_registered():
    spec = importlib.util.spec_from_file_location("add_kv_format", ROOT / "examples" / "add_kv_format.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    (block,) = (block for block in blocks() if "TokenFormat" in block)
    names = {
        "to_words": example._to_words,
        "to_planes": example._to_planes,
        "register": formats.register,
        "PageVectors": PageVectors,
        "PageWords": PageWords,
        "TokenFormat": TokenFormat,
        "POLICIES": POLICIES,
    }
    try:
        exec(block, names)
        assert get_format("fp8").value_bits == 8
        assert "longest_first" in POLICIES
    finally:
        FORMATS.pop("fp8", None)
        POLICIES.pop("longest_first", None)


def test_the_readme_calls_the_python_interface_as_it_is():
    (block,) = (block for block in blocks() if "llm.generate" in block)
    compile(block, "README.md", "exec")
    from fineserve_jax.config import EngineConfig
    from fineserve_jax.sampling_params import SamplingParams

    arguments = re.search(r"LLM\((.*?)\)", block).group(1)
    EngineConfig(**eval(f"dict({arguments.split(',', 1)[1]})"))
    SamplingParams(**eval(f"dict({re.search(r'SamplingParams[(](.*?)[)]', block).group(1)})"))


def test_no_figure_is_left_to_fill_in():
    assert "TODO" not in (ROOT / "README.md").read_text()
