"""Steps over 8 chips: their stages fit together, and collectives are found in what compilers print."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh

from benchmarks.aot.mesh import collectives
from benchmarks.aot.mesh_cases import mesh_cases
from benchmarks.aot.results import Result
from benchmarks.aot.step_cases import CHUNK_TOKENS, ROWS
from fineserve_jax.models.layers import SHARDS

HLO = """
  %all-reduce.3 = f32[288,5120]{1,0:T(8,128)} all-reduce(f32[288,5120]{1,0} %fusion.1), channel_id=1, to_apply=%add
  %ar-start = (f32[16,8]{1,0}, f32[4]{0}) all-reduce-start(f32[16,8]{1,0} %a, f32[4]{0} %b), channel_id=2
  %ar-done = (f32[16,8]{1,0}, f32[4]{0}) all-reduce-done((f32[16,8]{1,0}, f32[4]{0}) %ar-start)
  %gather = (bf16[32,64]{1,0}, bf16[32,512]{1,0}) all-gather-start(bf16[32,64]{1,0} %c), dimensions={1}
  %done = bf16[32,512]{1,0} all-gather-done((bf16[32,64]{1,0}, bf16[32,512]{1,0}) %gather)
  %fusion.2 = f32[8]{0} fusion(f32[288,5120]{1,0} %all-reduce.3), kind=kLoop
"""


def test_collectives_are_counted_once_by_what_they_give():
    assert collectives(HLO) == {"all-reduce": 4 * (288 * 5120 + 16 * 8 + 4), "all-gather": 2 * 32 * 512}


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_every_stage_takes_what_the_stage_before_gives(platform):
    sent = {}
    for case in mesh_cases(platform, AbstractMesh((8,), (SHARDS,))):
        jax.eval_shape(case.function, *case.arguments)
        sent[case.operation, case.model] = case.collective_bytes
    assert sent["step over 8: layer", "Llama-3.1-70B"] == 2 * 4 * (ROWS + CHUNK_TOKENS) * 8192
    assert sent["step over 8: head", "Qwen3-32B"] == 4 * ROWS * 151936


def test_more_bytes_than_must_be_sent_are_a_problem():
    sent = {"collectives": {"all-reduce": 8000}, "collectives_must": 8000}
    fair = Result("8 x H100", "step over 8: layer", "m", "f", 128, **sent)
    assert fair.problems() == []
    unfair = dataclasses.replace(fair, collectives={"all-reduce": 16000})
    assert unfair.problems() == ["collectives give each chip 16,000 bytes where 8,000 have to be given"]
