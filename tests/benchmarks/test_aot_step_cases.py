"""The stages of a step, as they are compiled for chips that are not there, are those that the runner calls."""

import jax
import pytest

from benchmarks.aot.step_cases import step_cases


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_stage_takes_what_the_stage_before_gives(platform):
    for case in step_cases(platform):
        jax.eval_shape(case.function, *case.arguments)
