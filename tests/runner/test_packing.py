"""What goes to the device in one piece comes out as it was."""

import functools
from typing import NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fineserve_jax.runner.packing import pack, unpack

DTYPES = (np.int32, np.uint32, np.float32, np.bool_)


class Pair(NamedTuple):
    one: np.ndarray
    other: dict[str, np.ndarray] | None


@functools.partial(jax.jit, static_argnums=(1, 2))
def taken_apart(words, layout, tree):
    return unpack(words, layout, tree)


def any_array() -> st.SearchStrategy[np.ndarray]:
    shapes = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
    return st.sampled_from(DTYPES).flatmap(lambda dtype: arrays.arrays(dtype, shapes))


@settings(max_examples=25, deadline=None)
@given(any_array(), any_array(), st.none() | st.dictionaries(st.sampled_from("ab"), any_array()), st.booleans())
def test_every_bit_of_every_array_is_there(one, last, other, is_transposed):
    tree = [Pair(one.T if is_transposed else one, other), last]
    found = taken_apart(*pack(tree))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for mine, given_one in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert (mine.shape, mine.dtype) == (given_one.shape, given_one.dtype)
        assert np.asarray(mine).tobytes() == given_one.tobytes()  # NaN and -0.0, too


def test_what_is_no_word_is_refused():
    with pytest.raises(TypeError, match="float16"):
        pack([np.zeros(3, np.float16)])
