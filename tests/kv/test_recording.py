"""Records of runs: what is written is read back, and whatever else is in a file is refused."""

import json

import numpy as np
import pytest
from kv_cases import BF16, INT4, INT8, arena

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.recording import Recorder, read_record
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams


def manager(num_slabs=6):
    return KVManager(arena(num_slabs), {("m", "bf16"): BF16, ("m", "int8"): INT8, ("m", "int4"): INT4})


def request(kv_precision):
    return Request("r", "m", kv_precision, SamplingParams(), [], 0, 10_000, 0, RequestTimes(arrival_s=0.0))


def test_an_entry_tells_how_memory_is_divided(tmp_path):
    kv, path = manager(), tmp_path / "run.jsonl"
    recorder = Recorder(path, kv, every=2)
    rows = [request("bf16"), request("int8")]
    assert kv.grow(rows[0], 4)  # a page of the two in a slab
    assert kv.grow(rows[1], 16)  # all four pages of one
    rows[1].num_computed_tokens = 8
    for step in range(1, 5):
        recorder.note(step, 0.5 * step, running=2, waiting=3, counts={"preemptions": 1})
    header, entries = read_record(path)
    assert (header.policy, header.pools, header.slab_bytes) == ("elastic", ["m/bf16", "m/int8", "m/int4"], 160)
    assert [entry.step for entry in entries] == [2, 4]
    entry = entries[0]
    assert (entry.time_s, entry.running, entry.waiting, entry.counts["preemptions"]) == (1.0, 2, 3, 1)
    usage = measure_usage(kv).formats
    assert entry.formats == {
        name: [usage[name].needed_bytes, usage[name].reserved_bytes, 0] for name in ("bf16", "int8")
    }
    bound = entry.slab_map[entry.slab_map[:, 0] > 0]
    assert sorted(map(tuple, bound.tolist())) == [(1, 128), (2, 255)]
    assert len(entry.slab_map) == 6
    assert not entry.slab_map[entry.slab_map[:, 0] == 0].any()


def test_an_entry_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "run.jsonl"
    recorder = Recorder(path, manager(), every=1)
    for step in (1, 2):
        recorder.note(step, 0.0, 0, 0, {})
    path.write_text(path.read_text()[:-20])
    assert [entry.step for entry in read_record(path)[1]] == [1]


def test_a_record_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "run.jsonl"
    Recorder(path, manager(), every=1).note(1, 0.0, 0, 0, {})
    Recorder(path, manager(), every=1).note(7, 0.0, 0, 0, {})
    assert [entry.step for entry in read_record(path)[1]] == [7]
    path.write_text('{"id": 1, "text": "an answer"}\n')
    with pytest.raises(ConfigError, match="is no record of a run; name another file"):
        Recorder(path, manager(), every=1)
    assert "an answer" in path.read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "is no record of a run; make one with"),
        ('{"id": 1}\n', "is no record of a run"),
        ("text\n", "is no record of a run"),
        (
            json.dumps({"kind": "fineserve-jax slabs", "version": 99}) + "\n",
            "of version 99; this program reads version 1",
        ),
    ],
)
def test_what_is_no_record_is_refused(tmp_path, content, message):
    path = tmp_path / "run.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_record(path)


def test_a_record_without_steps_is_refused(tmp_path):
    Recorder(tmp_path / "run.jsonl", manager(), every=1)
    with pytest.raises(ConfigError, match="holds no step"):
        read_record(tmp_path / "run.jsonl")


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot record to"):
        Recorder(tmp_path / "missing" / "run.jsonl", manager(), every=1)


def test_the_map_of_an_empty_arena_is_all_free(tmp_path):
    Recorder(tmp_path / "run.jsonl", manager(), every=1).note(1, 0.0, 0, 0, {})
    assert np.array_equal(read_record(tmp_path / "run.jsonl")[1][0].slab_map, np.zeros((6, 2), np.uint8))
