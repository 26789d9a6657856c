"""Which side of a page, keys or values, a format's auxiliary parts belong to."""

import jax
import pytest
from kernel_cases import ALL_FORMATS

from fineserve_jax.pallas_kernels.formats import Aux, PageWords
from fineserve_jax.pallas_kernels.formats.int8 import Int8
from fineserve_jax.pallas_kernels.formats.sides import KEYS, VALUES, sides_of_aux

EXPECTED = {
    "fp32": (),
    "int8": (KEYS, VALUES),
    "int4": (*[KEYS] * 4, VALUES, KEYS, KEYS, VALUES, VALUES),
}


class OneScale(Int8):
    """int8 whose keys and values share a scale."""

    name = "one scale"
    aux = (Aux.TOKEN,)

    def encode(self, k, v):
        words = super().encode(k, v)
        return PageWords(words.k, words.v, (jax.lax.max(*words.aux),))


@pytest.mark.parametrize("name", EXPECTED)
def test_sides_are_read_off_the_code_that_encodes(name):
    assert sides_of_aux(ALL_FORMATS[name]) == EXPECTED[name]


def test_a_part_of_both_sides_is_refused():
    with pytest.raises(ValueError, match=r"part 0 of KV format 'one scale' depends on keys and on values"):
        sides_of_aux(OneScale())
