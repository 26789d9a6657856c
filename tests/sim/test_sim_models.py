"""The simulator's models and formats are the engine's, written down again without jax."""

import subprocess
import sys

import pytest

from fineserve_jax.errors import ConfigError
from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.sim.models import CACHES, SHAPES, UNIT_WORDS, page_classes, parse_model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", CACHES)
def test_pages_are_as_long_as_the_engines(shape, name):
    geometry = PageGeometry(shape.num_layers, shape.num_kv_heads, shape.head_dim, 16, UNIT_WORDS)
    model = parse_model(shape.name)
    page_class = page_classes({model: [name]}, 16)[model.name, name]
    assert page_class.page_units == FORMATS[name].page_units(geometry)
    assert page_class.page_bytes == 2 * shape.num_layers * FORMATS[name].words_per_layer(geometry)
    assert (page_class.residual and page_class.residual.kv_format) == FORMATS[name].residual


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("smollm2-135m", 134.5e6), ("llama-3.1-8b", 8.03e9), ("llama-3.1-70b", 70.6e9), ("qwen-3-32b", 32.8e9)],
)
def test_models_have_as_many_parameters_as_their_cards_say(name, parameters):
    assert parse_model(name).weight_bytes / 2 == pytest.approx(parameters, rel=0.01)


def test_unknown_models_and_weights_are_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"model 'gpt-2' has no known shape; choose one of smollm2-135m, "):
        parse_model("gpt-2")
    with pytest.raises(ConfigError, match=r"weights 'int1' of 'llama-3.1-8b@int1' are not known; choose one of bf16"):
        parse_model("llama-3.1-8b@int1")


def test_the_simulator_imports_no_jax():
    code = "import sys, fineserve_jax.sim; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
