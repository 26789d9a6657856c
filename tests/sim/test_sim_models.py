"""The simulator's models are those of the published cards, its formats the engine's."""

import subprocess
import sys

import pytest
from example_modules import example
from sim_cases import MODEL, cluster, options, simulate, workload

from fineserve_jax.engine.page_shapes import page_classes as engine_classes
from fineserve_jax.errors import ConfigError
from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES
from fineserve_jax.pallas_kernels.formats import FORMATS, KVFormat, register
from fineserve_jax.sim import Kind
from fineserve_jax.sim.models import SHAPES, page_classes, parse_model


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", FORMATS)
def test_pages_are_as_long_as_the_engines(shape, name):
    model = parse_model(shape.name)
    assert page_classes({model: [name]}, 16) == engine_classes(model.name, shape.page_geometry(16), [name])


@pytest.fixture
def int2():
    """The format of the example, registered meanwhile."""
    module = example("add_kv_format")
    yield register(KVFormat(module.Keys(), module.Values())).name
    for registry in (FORMATS, FORMAT_SIZES):
        del registry["int2"]


def test_a_registered_format_can_be_simulated(int2):
    """Its pages are as long as the engine's."""
    classes = page_classes({MODEL: [int2]}, 16)
    assert classes == engine_classes(MODEL.name, MODEL.shape.page_geometry(16), [int2])
    assert classes[MODEL.name, int2].residual is classes[MODEL.name, "bf16"]
    bits = {name: cost.bits for name, cost in MODEL.cost([int2, "int4"], 16).formats.items()}
    assert 2 < bits[int2] < bits["int4"]
    run, kv = simulate(workload(seconds=2.0, mix=[Kind(1.0, options(int2))]), where=cluster(formats=[int2]))
    assert {one.outcome for one in run.requests} == {"length"}
    assert not kv.held


def test_an_unknown_format_is_refused_with_what_there_is():
    with pytest.raises(ConfigError, match=r"KV format 'int2' is not known; choose one of fp32, bf16, fp16, int8, fp8"):
        page_classes({MODEL: ["int2"]}, 16)


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
