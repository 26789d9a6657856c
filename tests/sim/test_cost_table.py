"""Cost models from tables, and profiles in files."""

import dataclasses
import json

import numpy as np
import pytest

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.scheduler import (
    DeviceRoofline,
    Scheduler,
    SchedulerConfig,
    StepCost,
    StepProfile,
    load_profiles,
    save_profiles,
)
from fineserve_jax.sim import DEVICES, Efficiency, parse_model
from fineserve_jax.sim.cost_table import Configuration, CostTable, read_table, roofline_profile

HEAD = "model,qformat,tp,mps_percentage,batch_size,input_len,output_len,seq_len,prefill_time,decode_time,ttft,tpot,e2e"
EAGER = Efficiency(step_overhead_s=0.0, layer_overhead_s=250e-6)


def write_table(path, factor=1.0, noise=0.0):
    """A table of a machine that is `factor` times as slow as the roofline, for two formats."""
    rng, lines = np.random.default_rng(0), [HEAD, "unknown-9b,org,1,100,1,256,256,512,1,1,1,1,1"]
    for qformat in ("org", "awq"):
        configuration = Configuration("llama-3.1-8b", qformat)
        profile = roofline_profile(configuration, DEVICES["h100"], EAGER)
        (kv,) = configuration.cost.formats.values()
        for batch in (1, 2, 4, 8, 16, 32):
            for length in (256, 512):
                tokens = batch * length
                ttft = profile.predict(StepCost(tokens, tokens * (length + 1) // 2, 0.0))
                tpot = profile.predict(StepCost(batch, 0, batch * (length + 128) * kv.bytes_per_token))
                ttft, tpot = (factor * value * rng.lognormal(0.0, noise) for value in (ttft, tpot))
                lines.append(f"llama-3.1-8b,{qformat},1,100,{batch},{length},256,{length + 256},0,0,{ttft},{tpot},0")
    path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_fit_predicts_rows_it_has_not_seen(tmp_path, factor):
    rows = read_table(write_table(tmp_path / "table.csv", factor, noise=0.02))
    seen = [row for i, row in enumerate(rows) if i % 4]
    table = CostTable(seen, DEVICES["h100"], Efficiency())
    for row in rows[::4]:
        profile = table.profiles[row.configuration]
        assert profile.predict(row.prefill()) == pytest.approx(row.ttft_s, rel=0.12)
        assert profile.predict(row.decode()) == pytest.approx(row.tpot_s, rel=0.08)


def test_models_are_looked_up_by_weights_and_the_rest_is_named(tmp_path):
    table = CostTable(read_table(write_table(tmp_path / "table.csv")), DEVICES["h100"], EAGER)
    awq = table.profile(parse_model("llama-3.1-8b@awq"), "int8")
    assert awq is table.profiles[Configuration("llama-3.1-8b", "awq")]
    with pytest.raises(ConfigError, match=r"the table has no llama-3.1-8b@fp8 tp=1 share=100; it has llama-3.1-8b@awq"):
        table.profile(parse_model("llama-3.1-8b@fp8"), "fp8")


def test_a_part_of_the_cores_slows_products_and_not_reading():
    whole, half = (
        roofline_profile(Configuration("llama-3.1-8b", "org", 1, share), DEVICES["h100"], EAGER) for share in (100, 50)
    )
    prefill, decode = StepCost(8192, 8192 * 512, 0.0), StepCost(8, 0, 1e9)
    assert half.predict(prefill) > 1.8 * whole.predict(prefill)
    assert half.predict(decode) == pytest.approx(whole.predict(decode))


@pytest.mark.parametrize(
    "text", ["a,b\n1,2\n", HEAD + "\n", HEAD + "\nllama-3.1-8b,org,one,100,1,256,256,0,0,0,1,1,1\n"]
)
def test_what_is_no_table_is_refused(tmp_path, text):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        read_table(path)


def learnt_profile():
    model = parse_model("llama-3.1-8b")
    profile = StepProfile(model.cost(["bf16", "int4"], 16), DeviceRoofline(1e14, 1e12, 1e-3))
    rng = np.random.default_rng(1)
    for tokens in rng.integers(1, 500, 40).tolist():
        profile.observe(StepCost(tokens, tokens**2, 1e6 * tokens), 0.01 + 1e-4 * tokens)
    return profile


def test_a_profile_comes_back_from_its_file_and_goes_on_learning(tmp_path):
    profile = learnt_profile()
    save_profiles(tmp_path / "profile.json", {"m": profile})
    (read,) = load_profiles(tmp_path / "profile.json").values()
    cost = StepCost(77, 1234, 5e6)
    assert (read.predict(cost), read.error, read.num_observed) == (profile.predict(cost), profile.error, 40)
    for each in (read, profile):
        each.observe(cost, 0.5)
    assert read.to_dict() == profile.to_dict()


def test_a_scheduler_starts_from_profiles_of_its_own_models_only():
    learnt = learnt_profile()
    kv_formats = {"m": learnt.model}
    scheduler = Scheduler(SchedulerConfig(), kv_of_one_page(), kv_formats, learnt.roofline)
    scheduler.start_from({"m": learnt, "other": learnt})
    assert scheduler.profiles == {"m": learnt}
    other = StepProfile(dataclasses.replace(learnt.model, weight_bytes=1.0), learnt.roofline)
    with pytest.raises(ConfigError, match="the step profile of 'm' was learnt with other weights"):
        scheduler.start_from({"m": other})


def kv_of_one_page():
    page_class = PageClass("m", "bf16", 1, 16, 256)
    return KVManager(SlabAllocator(4, 1, "elastic", [page_class]), {("m", "bf16"): page_class})


@pytest.mark.parametrize("text", ["", "[]", '{"m": {"model": {}}}', json.dumps({"m": {"coefficients": 1}})])
def test_what_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "profile.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="is no step profile"):
        load_profiles(path)
    with pytest.raises(ConfigError, match="cannot read the step profile"):
        load_profiles(tmp_path / "none.json")
