"""Compiled programs sum as NumPy does, however many rows there are."""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runner_cases import PAGE_SIZE, Feed, World

from fineserve_jax.runner import programs, step_programs
from fineserve_jax.runner.programs import FUSION_FLAG, SINGLE_PRODUCTS, compile_counted, compiler_options

NEEDED = version("jaxlib").startswith("0.10.")
on_cpus = pytest.mark.skipif(jax.default_backend() != "cpu", reason="a fault of XLA on CPUs")


def joined_products(text: str) -> list[str]:
    """Of a compiled program, the computations that are handed to YNNPACK and hold both a product and a reduction."""
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    fused = re.findall(r"kind=kCustom, calls=%([\w.\-]+)[^\n]*__ynn_fusion", text)
    return [name for name in fused if " dot(" in bodies[name] and " reduce(" in bodies[name]]


def squared_lengths(x):
    """The example of jax-ml/jax#39103."""
    return jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))(x)


@pytest.mark.parametrize("rows", [1, 1000, 32_769, 100_003])
def test_sums_of_many_products_are_right(rows):
    x = np.zeros((rows, 3), np.float32)
    x[:, 0] = np.arange(rows)
    found = compile_counted(squared_lengths, lambda: None)(x)
    np.testing.assert_allclose(found, np.arange(rows, dtype=np.float64) ** 2, rtol=1e-6)


@pytest.mark.parametrize(("rows", "vocabulary"), [(7, 49_157), (1_023, 2_111), (33_333, 67)])
def test_log_probabilities_of_many_rows_are_right(rows, vocabulary):
    rng = np.random.default_rng(rows)
    x, head = rng.normal(size=(rows, 48)).astype(np.float32), rng.normal(size=(vocabulary, 48)).astype(np.float32)
    found = compile_counted(lambda x, head: jax.nn.log_softmax(x @ head.T, axis=-1)[:, :5], lambda: None)(x, head)
    logits = x.astype(np.float64) @ head.T.astype(np.float64)
    top = logits.max(axis=-1, keepdims=True)
    expected = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(found, expected[:, :5], atol=2e-4)


@on_cpus
def test_no_program_of_a_step_joins_products_with_reductions(monkeypatch):
    texts = []

    def compile_and_note(function, on_compile, donate_argnums=(), static_argnums=()):
        def call(*arguments):
            options = {"donate_argnums": donate_argnums, "static_argnums": static_argnums}
            jitted = jax.jit(function, **options, compiler_options=compiler_options())
            compiled = jitted.lower(*arguments).compile()
            texts.append(compiled.as_text())
            return compiled(*(argument for i, argument in enumerate(arguments) if i not in static_argnums))

        return call

    monkeypatch.setattr(step_programs, "compile_counted", compile_and_note)
    step_programs.step_programs.cache_clear()
    try:
        tokens = tuple(range(1, PAGE_SIZE + 3))
        world = World(("bf16", "int8", "fp8", "int4"), scores=True)
        world.feed([Feed(name, tokens, (PAGE_SIZE, 1, 1)) for name in ("bf16", "int8", "fp8", "int4")])
    finally:
        step_programs.step_programs.cache_clear()
    assert len(texts) >= 5
    assert [name for text in texts for name in joined_products(text)] == []


@on_cpus
@pytest.mark.skipif(not NEEDED, reason="later releases of jaxlib sum right by themselves")
def test_the_remedy_is_still_needed_and_the_search_for_joined_products_finds_them():
    x = jnp.ones((32_769, 3))
    assert joined_products(jax.jit(squared_lengths).lower(x).compile().as_text())
    remedied = jax.jit(squared_lengths, compiler_options={FUSION_FLAG: SINGLE_PRODUCTS}).lower(x).compile()
    assert not joined_products(remedied.as_text())


def test_a_flag_that_the_user_has_set_is_left_alone(monkeypatch):
    monkeypatch.setattr(programs, "version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", f"--{FUSION_FLAG}=")
    assert compiler_options() is None
    monkeypatch.delenv("XLA_FLAGS")
    assert (compiler_options() is None) == (jax.default_backend() != "cpu")
    monkeypatch.setattr(programs, "version", lambda name: "0.11.0")
    assert compiler_options() is None


@on_cpus
def test_the_users_flag_and_the_programs_go_together():
    """XLA reads the flag when it starts, and refuses what it does not know: this one it knows."""
    script = "import jax.numpy as jnp; from fineserve_jax.runner.programs import compile_counted as c; "
    script += "print(c(lambda x: x + 1, lambda: None)(jnp.float32(1)))"
    environment = os.environ | {"XLA_FLAGS": f"--{FUSION_FLAG}=", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert float(done.stdout) == 2.0
