"""Engines of a plan on devices of their own, which are parts of one CPU. `test_fleet_devices.py` runs this file by
itself, in a process that has 4.
"""

from typing import Any

import jax

from fineserve_jax import LLM, SamplingParams
from fineserve_jax.kv.integrity import check_integrity

TEN = SamplingParams(max_tokens=10, ignore_eos=True)


def test_engines_compute_on_the_devices_of_the_plan_what_one_computes(make_plan):
    prompts, names = [f"prompt {i}" for i in range(10)], ["a", "b"] * 5
    with LLM(plan=make_plan([{"devices": [0], "models": ["a", "b"]}], a={}, b={"kv_precision": "int8"})) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, TEN, model=names)]
    own = {"settings": {"kv_memory": "4MiB"}}
    engines = [
        {"devices": [2], "models": ["a", "b"], "shares": {"a": 0.5, "b": 0.25}},
        {"devices": [1], "models": ["a"]} | own,
        {"devices": [3], "models": ["b"]} | own,
    ]
    with LLM(plan=make_plan(engines, a={}, b={"kv_precision": "int8"})) as llm:
        found = [output.outputs[0].token_ids for output in llm.generate(prompts, TEN, model=names)]
        assert found == expected
        fleet: Any = llm.intake
        served = [replica.engine for replica in fleet.replicas.values()]
        for engine, number in zip(served, (2, 1, 3), strict=True):
            assert engine.arena.units.devices() == {jax.devices()[number]}
            for model in engine.models.values():
                assert {d for leaf in jax.tree.leaves(model.model.params) for d in leaf.devices()} == {
                    jax.devices()[number]
                }
            assert engine.stats().num_output_tokens
            check_integrity(engine.kv)
        assert served[0].scheduler.quotas.account.guaranteed.keys() == {"model:a", "model:b"}


def test_an_engine_of_a_plan_may_be_several_devices(make_plan):
    """Two devices compute each step together, beside one that is alone: tokens are those of one device."""
    prompts = [f"prompt {i}" for i in range(12)]
    exact = {"settings": {"kv_precision": "fp32", "kv_formats": ["fp32"], "kv_memory": "8MiB"}}
    with LLM(plan=make_plan([{"devices": [0], "models": ["a"]} | exact], a={})) as llm:
        expected = [output.outputs[0].token_ids for output in llm.generate(prompts, TEN)]
    engines = [{"devices": [3, 1], "models": ["a"]} | exact, {"devices": [2], "models": ["a"]} | exact]
    with LLM(plan=make_plan(engines, a={})) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, TEN)] == expected
        fleet: Any = llm.intake
        pair, single = (replica.engine for replica in fleet.replicas.values())
        assert (pair.config.tensor_parallel, single.config.tensor_parallel) == (2, 1)
        placed = {device for leaf in jax.tree.leaves(pair.models["a"].model.params) for device in leaf.devices()}
        assert placed == {jax.devices()[3], jax.devices()[1]}
        for engine in (pair, single):
            assert engine.stats().num_output_tokens
            check_integrity(engine.kv)
        llm.load_model("b", llm_source(make_plan), engines=[0])
        answered = llm.generate(prompts, TEN, model="b")
        assert [output.outputs[0].token_ids for output in answered] == expected
        check_integrity(pair.kv)


def llm_source(make_plan):
    """The tiny model in the precision of the others."""
    plan = make_plan([{"devices": [0], "models": ["a"]}], a={})
    return {"model": plan.models["a"].model, "kv_precision": "fp32"}
