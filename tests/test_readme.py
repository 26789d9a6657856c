"""What the README and the guides show works."""

import collections
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from example_modules import example

import fineserve_jax
from fineserve_jax import KV_FORMATS, POLICIES, KVFormat
from fineserve_jax.entrypoints.batch.report_sections import SECTIONS
from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request.logits_processor import PROCESSORS

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.fixture
def registries():
    """As they were, afterwards."""
    kept = [(registry, dict(registry)) for registry in (KV_FORMATS, FORMAT_SIZES, POLICIES, PROCESSORS, SECTIONS)]
    yield
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def relative_errors(name: str) -> list[float]:
    """Of normally distributed keys and values, read back."""
    k, v = np.random.default_rng(1).standard_normal((2, 3, 16, 64), np.float32)
    read = get_format(name).decode_vectors(get_format(name).encode_vectors(k, v))
    return [float(np.linalg.norm(part - x) / np.linalg.norm(x)) for part, x in zip(read, (k, v), strict=True)]


@pytest.mark.usefixtures("registries")
def test_what_the_guide_registers_does_what_it_says():
    """Two bits a normal number keep it to within 0.35 of a standard deviation at best (Max, 1960)."""
    public = {name: getattr(fineserve_jax, name) for name in fineserve_jax.__all__}
    for block in blocks("docs/extend.md"):
        exec(block, public | vars(fineserve_jax.bit_packing) | {"jnp": jnp, "np": np, "collections": collections})
    assert max(relative_errors("int2")) < 0.45
    assert "longest_first" in POLICIES
    at_most = PROCESSORS["at_most"]
    state, banned = at_most.start([7], 9, token=7, times=2), []
    for token in (7, 3, 7, 7):
        banned.append(bool(np.isneginf(at_most.apply(state, jnp.zeros(9))).any()))
        state = at_most.update(state, token)
    assert banned == [False, False, False, True]
    assert "Ends" in SECTIONS


@pytest.mark.usefixtures("registries")
def test_the_format_of_the_example_can_be_registered():
    module = example("add_kv_format")
    fineserve_jax.register_kv_format(KVFormat(module.Keys(), module.Values()))
    assert max(relative_errors("int2")) < 0.4


def test_the_python_interface_is_called_as_it_is():
    (one,) = blocks("README.md")
    short, by_layer, several = blocks("docs/python.md")
    from fineserve_jax import EngineConfig, SamplingParams
    from fineserve_jax.engine.model_settings import model_sources
    from fineserve_jax.request.request_options import OptionKeywords

    arguments = re.search(r"LLM\((.*?)\)", one).group(1)
    EngineConfig(**eval(f"dict({arguments.split(',', 1)[1]})"))
    recipes = EngineConfig(**eval(f"dict({re.search(r'LLM[(].*?, (.*)[)]', by_layer).group(1)})")).kv_recipes
    assert re.search(r'kv_precision="(.*?)"', by_layer).group(1) in recipes
    assert list(model_sources(eval(re.search(r"models = (.*)\n", several).group(1)))) == ["exact", "fast"]
    assert {"kv_precision", "min_kv_precision"} <= OptionKeywords.__annotations__.keys() & set(
        re.findall(r"(\w+)=", short)
    )
    for block in (one, several, short):
        compile(block, "a page", "exec")
        SamplingParams(**eval(f"dict({re.search(r'SamplingParams[(](.*?)[)]', block).group(1)})"))


def test_no_figure_is_left_to_fill_in():
    assert "TODO" not in (ROOT / "README.md").read_text()
