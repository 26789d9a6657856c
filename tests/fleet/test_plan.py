"""The file form of a plan: what it says, and what it may not say."""

import pytest
import yaml

from fineserve_jax import LLM
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.entrypoints.cli import main
from fineserve_jax.errors import ConfigError, EngineError
from fineserve_jax.fleet import Plan, load, load_fleet, open_engines, read_plan
from fineserve_jax.kv.quotas import Quota

TEXT = """
version: 1
models:
  chat: {model: some.gguf, weights: int8}
  code: smollm2-135m
settings: {max_seq_len: 1024, kv_memory: 1GB}
engines:
  - {devices: [0], models: [chat, code], settings: {kv_memory: 2GB}, shares: {chat: 0.6, code: 0.25}}
  - {devices: [1, 2], models: [chat]}
"""


def test_a_plan_says_what_each_engine_is(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(TEXT)
    plan = read_plan(path)
    first, second = plan.engines
    assert {name: source.model for name, source in plan.sources_of(first).items()} == {
        "chat": "some.gguf",
        "code": "smollm2-135m",
    }
    config = plan.config_of(first)
    assert (config.kv_memory, config.max_seq_len, config.tensor_parallel) == ("2GB", 1024, 1)
    assert config.quotas == {"model:chat": Quota(guaranteed=0.6), "model:code": Quota(guaranteed=0.25)}
    config = plan.config_of(second)
    assert (config.kv_memory, config.tensor_parallel, config.quotas) == ("1GB", 2, {})
    path.write_text(plan.to_yaml())
    assert read_plan(path) == plan


def test_quotas_of_classes_are_those_of_each_engine():
    plan = Plan(**yaml.safe_load(TEXT)).with_quotas({"tenant:alice": Quota(max=0.5)})
    assert [plan.config_of(engine).quotas["tenant:alice"].max for engine in plan.engines] == [0.5, 0.5]
    with pytest.raises(ConfigError, match="'tenant:alice' has a quota in the plan and in the classes"):
        plan.with_quotas({"tenant:alice": Quota()})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version=2"),
        ({"engines": []}, "engines"),
        ({"models": {}}, "names no model"),
        ({"machines": 3}, "unknown setting 'machines'; the settings are: engines, models, settings, version"),
        ({"settings": {"kv_memry": 1}}, "engine 0, model 'chat': unknown setting 'kv_memry'"),
        ({"settings": {"tensor_parallel": 2}}, "tensor_parallel is no setting of an engine in a plan; leave it out"),
        ({"engines": [{"devices": [0], "models": ["chat"]}]}, "no engine serves 'code'; give it one"),
        ({"engines": [{"devices": [0], "models": ["x"]}]}, "an engine serves 'x', which is not among models: chat"),
        ({"engines": [{"devices": [], "models": ["chat"]}]}, "devices"),
        ({"engines": [{"devices": [0, 0], "models": ["chat"]}]}, r"devices=\[0, 0\] names one twice"),
        ({"engines": [{"devices": [-1], "models": ["chat"]}]}, "devices are numbered from 0 on"),
        ({"engines": [{"devices": [0], "models": ["chat"], "shares": {"code": 1}}]}, "a share for 'code', which the"),
        (
            {"engines": [{"devices": [0], "models": ["chat", "code"], "shares": {"chat": 0.7, "code": 0.7}}]},
            "guaranteed shares add up to 1.4",
        ),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(tmp_path, changes, message):
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(TEXT) | changes))
    with pytest.raises(ConfigError, match=rf"plan\.yaml: .*{message}"):
        read_plan(path)


def test_devices_that_there_are_not_are_told_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(load, "load_engine", None)
    with pytest.raises(ConfigError, match="engine 1 of the plan is on device 99, and there are"):
        load_fleet(Plan(**yaml.safe_load(TEXT.replace("[1, 2]", "[99]"))))


def test_a_plan_says_all_itself():
    plan = Plan(**yaml.safe_load(TEXT))
    with pytest.raises(ConfigError, match="model, kv_memory beside a plan, which says that itself"):
        open_engines("smollm2-135m", None, plan, {"kv_memory": 1})


def test_the_command_refuses_what_the_plan_says(tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    path.write_text(TEXT)
    for flags in (["--model", "smollm2-135m"], ["--kv-memory", "1GB"]):
        assert main(["serve", "--plan", str(path), *flags]) == 2
        assert "beside --plan, which says them itself" in capsys.readouterr().err
    assert main(["serve", "--plan", str(tmp_path / "other.yaml")]) == 2
    assert "cannot read the configuration" in capsys.readouterr().err


WORKLOAD = """
devices: [h100, h100, h100]
models:
  - {model: llama-3.1-8b@awq, source: llama.gguf, kv_precision: int4, rate: 8}
  - {model: llama-3-8b, rate: 2, ttft_slo_s: 5}
  - {model: llama-3-8b, rate: 1, kv_precision: int8}
"""


def test_place_writes_a_plan_whose_engines_are_those_of_the_placement(tmp_path, capsys):
    workload, path = tmp_path / "workload.yaml", tmp_path / "plan.yaml"
    workload.write_text(WORKLOAD)
    assert main(["place", str(workload), "--plan", str(path), "--json", str(tmp_path / "placement.json")]) == 0
    plan = read_plan(path)
    assert {name: (s.model, s.weights, s.kv_precision) for name, s in plan.models.items()} == {
        "llama-3.1-8b@awq": ("llama.gguf", "int4", "int4"),
        "llama-3-8b/1": ("llama-3-8b", "bf16", "bf16"),
        "llama-3-8b/2": ("llama-3-8b", "bf16", "int8"),
    }
    placed = yaml.safe_load((tmp_path / "placement.json").read_text())
    replicas = {
        (name, tuple(devices))
        for name, model in zip(plan.models, placed["models"], strict=True)
        for devices in model["replicas"]
    }
    assert {(name, engine.devices) for engine in plan.engines for name in engine.models} == replicas
    used = [0.0, 0.0, 0.0]
    for engine in plan.engines:
        assert sum(engine.shares.values()) <= 1
        for device in engine.devices:
            used[device] += engine.settings["kv_memory"]
    assert all(bytes_ <= placed["devices"][device]["kv_bytes"] for device, bytes_ in enumerate(used))
    workload.write_text(WORKLOAD.replace("@awq", "@fp8"))
    assert main(["place", str(workload), "--plan", str(path)]) == 2
    assert "weights 'fp8' of llama-3.1-8b@fp8 are the simulator's alone" in capsys.readouterr().err


def test_a_quota_of_a_model_that_is_not_served_is_refused(directory):
    config = EngineConfig(kv_memory="8MiB", max_seq_len=128, weights="fp32", quotas={"model:x": Quota()})
    with pytest.raises(ConfigError, match="a quota for 'model:x', which is not served; the models are: tiny"):
        load_engine(str(directory), config)


def test_there_is_no_only_engine_of_several(make_plan):
    with LLM(plan=make_plan([{"devices": [0], "models": ["a"]}], a={})) as llm:
        with pytest.raises(EngineError, match="several engines, by a plan"):
            _ = llm.engine
        assert list(llm.intake.models) == ["a"]
