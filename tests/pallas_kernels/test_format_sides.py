"""Which side of a page, keys or values, a format's scale arrays belong to."""

import jax
import pytest
from kernel_cases import ALL_FORMATS

from fineserve_jax.pallas_kernels.formats import Granularity, PageWords
from fineserve_jax.pallas_kernels.formats.int8 import Int8KV
from fineserve_jax.pallas_kernels.formats.sides import KEYS, VALUES, sides_of_scales

EXPECTED = {
    "fp32": (),
    "int8": (KEYS, VALUES),
    "int4": (*[KEYS] * 4, VALUES, KEYS, KEYS, VALUES, VALUES),
}


class OneScale(Int8KV):
    """int8 whose keys and values share a scale."""

    name = "one scale"
    scales = (Granularity.TOKEN,)

    def encode(self, k, v):
        words = super().encode(k, v)
        return PageWords(words.k, words.v, (jax.lax.max(*words.scales),))


@pytest.mark.parametrize("name", EXPECTED)
def test_sides_are_read_off_the_code_that_encodes(name):
    assert sides_of_scales(ALL_FORMATS[name]) == EXPECTED[name]


def test_a_scale_of_both_sides_is_refused():
    with pytest.raises(ValueError, match=r"scale array 0 of KV format 'one scale' depends on keys and on values"):
        sides_of_scales(OneScale())
