"""The fragmentation benchmark: every way to divide memory serves the same requests, and the figures add up."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from fragmentation import WAYS, Arguments, Case, run
from slab_world import LONGEST, read_lengths

ARGUMENTS = Arguments(kv_memory=256 * 2**20, contexts=(2048,), steps=80, every=5)


@pytest.mark.parametrize("name", WAYS)
def test_all_requests_are_served_out_of_the_memory_there_is(name):
    lengths = read_lengths(Path("no such trace"), 2048)
    samples = run(ARGUMENTS, lengths, Case(WAYS[name], 2048, 16, drains=True))
    busy = samples.where(samples.running > 0)
    assert (busy.cached <= busy.granted + 1).all()
    assert (busy.granted <= busy.reserved).all()
    assert (busy.reserved <= busy.usable).all()
    assert busy.running.max() > 5
    assert (samples.moved > 0) == WAYS[name].compacts or name == "uniform"


def test_lengths_without_a_trace_are_like_those_of_the_trace():
    lengths = read_lengths(Path("no such trace"), LONGEST)
    assert 1000 < np.median(lengths.prompts) < 1100
    assert 1100 < lengths.prompts.mean() < 1300
    assert 190 < lengths.outputs.mean() < 240
    assert (lengths.prompts + lengths.outputs).max() <= LONGEST
    assert min(lengths.prompts.min(), lengths.outputs.min()) >= 1
