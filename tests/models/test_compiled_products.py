"""Compiled products, with whichever of this processor's instruction sets, and when they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weight_formats import FORMATS, decode, random_matrix, rounded_activations

from fineserve_jax.errors import ConfigError
from fineserve_jax.models import product_choice
from fineserve_jax.pallas_kernels.cpu import library

REASON = library.why_unavailable()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SETS = () if REASON else library.instruction_sets()
KINDS = ("bf16", "int8", "int4")
ROWS = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 32, 33, 257])
jitted = {kind: jax.jit(FORMATS[kind].dot) for kind in KINDS}


@pytest.fixture(autouse=True, scope="module")
def _as_by_default():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(product_choice.VARIABLE, raising=False)
        yield


def stored(kind: str, matrix: np.ndarray) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in FORMATS[kind].pack(matrix).items()}


def on_every_instruction_set(check) -> None:
    for name in SETS:
        library.use_instruction_set(name)
        check()
    library.use_instruction_set(SETS[0])


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12)
@given(rows=ROWS, out=st.integers(1, 70), inner=st.integers(1, 300), seed=st.integers(0, 2**32 - 1))
def test_they_equal_float64_products_of_the_stored_values(kind, rows, out, inner, seed):
    """Whatever the shape: rows, outputs and inputs that fill no whole tiles and registers."""
    if kind == "int4":
        inner = -(-inner // 64) * 64
    matrix, x = random_matrix(seed, out, inner), random_matrix(seed + 1, rows, inner)
    packed = stored(kind, matrix)
    dense = decode(kind, packed)
    if kind == "int4":
        dense = dense.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    expected = rounded_activations(kind, x) @ dense.T
    magnitude = np.abs(rounded_activations(kind, x)) @ np.abs(dense).T

    def check():
        found = np.asarray(FORMATS[kind].dot(packed, jnp.asarray(x)))
        assert (found.dtype, found.shape) == (np.float32, (rows, out))
        assert (np.abs(found - expected) <= 2e-6 * magnitude + 1e-30).all()  # of sums in f32, in any order

    on_every_instruction_set(check)


@needs_kernels
@settings(max_examples=12)
@given(rows=ROWS, out=st.integers(1, 70), inner=st.integers(1, 700), seed=st.integers(0, 2**32 - 1))
def test_int8_sums_are_exact(rows, out, inner, seed):
    """The integers that XLA computes: with scales of 1 they are the results."""
    rng = np.random.default_rng(seed)
    kernel, x = (rng.integers(-127, 128, shape) for shape in ((out, inner), (rows, inner)))
    x[:, 0] = 127  # the largest: every row's step is 1
    packed = {"kernel": jnp.asarray(kernel, jnp.int8), "scale": jnp.ones(out, jnp.float32)}

    def check():
        found = np.asarray(FORMATS["int8"].dot(packed, jnp.asarray(x, jnp.float32)))
        np.testing.assert_array_equal(found, x @ kernel.T)

    on_every_instruction_set(check)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_they_give_what_xla_gives(kind, monkeypatch):
    packed, x = stored(kind, random_matrix(1, 96, 640)), jnp.asarray(random_matrix(2, 5, 640))
    found = FORMATS[kind].dot(packed, x)
    monkeypatch.setenv(product_choice.VARIABLE, "xla")
    expected = np.asarray(FORMATS[kind].dot(packed, x))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@needs_kernels
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_spoils_itself_alone(kind, value):
    packed, x = stored(kind, random_matrix(1, 40, 128)), random_matrix(2, 7, 128)
    x[3, 77] = value

    def check():
        found = np.asarray(FORMATS[kind].dot(packed, jnp.asarray(x)))
        assert not np.isfinite(found[3]).any()
        assert np.isfinite(np.delete(found, 3, axis=0)).all()

    on_every_instruction_set(check)


@needs_kernels
@pytest.mark.parametrize("rows", [3, 33, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_gets_the_same_bits_whatever_is_beside_it(kind, rows):
    """Wherever it stands among as many rows: which kernel multiplies is decided by their number."""
    packed = stored(kind, random_matrix(1, 70, 200 if kind != "int4" else 256))
    x, beside = (random_matrix(seed, rows, 200 if kind != "int4" else 256) for seed in (2, 3))
    order = np.random.default_rng(4).permutation(rows)
    beside[order[: rows // 2]] = x[: rows // 2]

    def check():
        found, moved = (np.asarray(jitted[kind](packed, jnp.asarray(own))) for own in (x, beside))
        np.testing.assert_array_equal(moved[order[: rows // 2]], found[: rows // 2])

    on_every_instruction_set(check)


@needs_kernels
@pytest.mark.parametrize("rows", [1, 5, 33, 300])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_are_left_out_and_leave_the_others_their_bits(kind, rows):
    packed, x = stored(kind, random_matrix(1, 70, 256)), random_matrix(2, rows, 256)
    zeros = np.random.default_rng(rows).permutation(rows)[: -(-rows // 2)]
    some = x.copy()
    some[zeros] = 0.0

    def check():
        full, found = (np.asarray(jitted[kind](packed, jnp.asarray(own))) for own in (x, some))
        np.testing.assert_array_equal(found, np.where(np.isin(np.arange(rows), zeros)[:, None], 0.0, full))

    on_every_instruction_set(check)


# -- when they are used ------------------------------------------------------------------------------------


def targets(kind: str, rows: int) -> bool:
    """Whether a product of so many rows calls a compiled kernel."""
    packed = stored(kind, random_matrix(1, 16, 64))
    return "ffi_call" in str(
        jax.make_jaxpr(lambda *arguments: FORMATS[kind].dot(*arguments))(packed, jnp.zeros((rows, 64)))
    )


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_used_up_to_so_many_rows(kind, monkeypatch):
    monkeypatch.delenv(product_choice.VARIABLE, raising=False)
    most = product_choice.MOST_ROWS[kind]
    assert [targets(kind, rows) for rows in (1, most, most + 1)] == [True, True, False]
    monkeypatch.setenv(product_choice.VARIABLE, "xla")
    assert not targets(kind, 1)


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_programs_for_other_platforms_have_xlas(kind):
    """Those that are compiled ahead of time on a host with a CPU only."""
    packed, x = stored(kind, random_matrix(1, 16, 64)), jnp.zeros((1, 64))
    traced = jax.jit(lambda *arguments: FORMATS[kind].dot(*arguments)).trace(packed, x)
    found = {
        platform: "fineserve_multiply" in traced.lower(lowering_platforms=(platform,)).as_text()
        for platform in ("cpu", "cuda", "tpu")
    }
    assert found == {"cpu": True, "cuda": False, "tpu": False}


def test_where_they_were_not_built_xla_multiplies_and_asking_for_them_is_refused(monkeypatch):
    monkeypatch.setattr(library, "why_unavailable", lambda: "they were not built")
    monkeypatch.delenv(product_choice.VARIABLE, raising=False)
    assert not any(targets(kind, 1) for kind in KINDS)
    monkeypatch.setenv(product_choice.VARIABLE, "cpu")
    with pytest.raises(ConfigError, match="FINESERVE_PRODUCTS='cpu' cannot be used: they were not built, or use 'xla'"):
        product_choice.compiled_products()


def test_an_implementation_that_there_is_not_is_refused(monkeypatch):
    monkeypatch.setenv(product_choice.VARIABLE, "mkl")
    with pytest.raises(ConfigError, match=r"FINESERVE_PRODUCTS='mkl' is no implementation.*use one of xla, cpu"):
        product_choice.compiled_products()
