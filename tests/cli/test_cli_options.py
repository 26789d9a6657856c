"""One set of options for Python, flags and YAML files."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import tyro
import yaml
from pydantic import BaseModel

from fineserve_jax import ConfigError, EngineConfig, RequestError, SamplingParams
from fineserve_jax.entrypoints.cli.model_flags import DEFAULT_MODEL
from fineserve_jax.entrypoints.cli.options import flags_of, settle
from fineserve_jax.scheduler import SchedulerConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))

# A flag for every field, with a value that is not the default.
ENGINE: dict[str, tuple[list[str], Any]] = {
    "weights": (["int8"], "int8"),
    "kv_precision": (["int8"], "int8"),
    "kv_formats": (["int8", "bf16"], ("int8", "bf16")),
    "kv_recipes": (["a 'int4, first layer bf16'"], {"a": "int4, first layer bf16"}),
    "kv_memory": (["0.25"], 0.25),
    "max_batch_size": (["8"], 8),
    "max_seq_len": (["64"], 64),
    "page_size": (["32"], 32),
    "max_chunk_tokens": (["64"], 64),
    "slab_policy": (["partitioned"], "partitioned"),
    "slab_shares": (["int8 0.75", "bf16 0.25"], {"int8": 0.75, "bf16": 0.25}),
    "policy": (["sjf"], "sjf"),
    "tenant_weights": (["a 2", "b 0.5"], {"a": 2.0, "b": 0.5}),
    "step_profile": (["steps.json"], "steps.json"),
    "num_speculative_tokens": (["3"], 3),
    "tensor_parallel": (["2"], 2),
    "ageing_s": (["1.5"], 1.5),
    "overtaking_limit_s": (["90"], 90.0),
    "growth_reserve_pages": (["3"], 3),
    "narrow_keep_pages": (["0"], 0),
    "seed": (["3"], 3),
    "prefix_cache": (["convert"], "convert"),
    "preemption": (["swap"], "swap"),
    "swap_memory": (["64MiB"], "64MiB"),
    "record": (["run.jsonl"], Path("run.jsonl")),
    "record_every": (["5"], 5),
    "check_every": (["7"], 7),
}
SAMPLING: dict[str, tuple[list[str], Any]] = {
    "max_tokens": (["9"], 9),
    "min_tokens": (["2"], 2),
    "temperature": (["0.5"], 0.5),
    "top_k": (["4"], 4),
    "top_p": (["0.9"], 0.9),
    "min_p": (["0.1"], 0.1),
    "repetition_penalty": (["1.1"], 1.1),
    "presence_penalty": (["-0.5"], -0.5),
    "frequency_penalty": (["0.25"], 0.25),
    "logit_bias": (["5 -1.5", "6 2"], {5: -1.5, 6: 2.0}),
    "seed": (["3"], 3),
    "n": (["2"], 2),
    "stop": (["a b", "c"], ("a b", "c")),
    "stop_token_ids": (["7", "8"], (7, 8)),
    "logprobs": (["0"], 0),
    "logprob_token_ids": (["7", "8"], (7, 8)),
    "prompt_logprobs": (["2"], 2),
}
TABLES = ("quotas", "structured_outputs", "logits_processors")  # tables of tables are for YAML files


def given(settings: type[BaseModel], words: list[str]):
    """What flags give, in settings' terms."""
    flags = tyro.cli(flags_of(settings, leave_out=TABLES), args=words, config=(tyro.conf.DisallowNone,))
    if settings is EngineConfig:
        return settle(None, None, flags).engine
    return settle(None, None, {}, flags).sampling


def words_of(name: str, values: list[str]) -> list[str]:
    pairs = name in ("kv_recipes", "slab_shares", "tenant_weights", "logit_bias")
    return [word for v in values for word in (f"--{name.replace('_', '-')}", *(shlex.split(v) if pairs else [v]))]


def test_a_floor_is_a_flag_and_is_refused_where_it_frees_nothing():
    words = ["--kv-precision", "auto", "--min-kv-precision", "int4"]
    assert given(EngineConfig, words) == {"kv_precision": "auto", "min_kv_precision": "int4"}
    with pytest.raises(ConfigError, match="slab_policy='uniform'"):
        given(EngineConfig, [*words, "--slab-policy", "uniform"])


@pytest.mark.parametrize(
    ("settings", "values", "switches"),
    [
        (EngineConfig, ENGINE, ["async_scheduling", "chunked_prefill", "slo_aware", "check_finite", "reproducible"]),
        (SamplingParams, SAMPLING, ["ignore_eos", "include_stop_str_in_output", "skip_special_tokens"]),
    ],
)
def test_every_setting_is_a_flag_of_the_same_name(settings, values, switches):
    # A floor does not go with a partitioned memory.
    assert {*values, *switches} == set(settings.model_fields) - {*TABLES, "min_kv_precision"}
    words = [word for name, (typed, _) in values.items() for word in words_of(name, typed)]
    assert given(settings, words) == {name: value for name, (_, value) in values.items()}
    for switch in switches:
        flag = switch.replace("_", "-")
        assert given(settings, [f"--{flag}"]) == {switch: True}
        assert given(settings, [f"--no-{flag}"]) == {switch: False}


def test_every_flag_has_help(capsys):
    """Fields that the engine's settings inherit from the scheduler's included."""
    with pytest.raises(SystemExit):
        tyro.cli(flags_of(EngineConfig, leave_out=["quotas"]), args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "whatever the priority, the policy and the targets" in shown
    assert "precision of the weights: fp32, bf16" in shown
    assert "Attributes:" not in shown


def test_the_engine_and_its_scheduler_have_one_set_of_defaults():
    engine, scheduler = EngineConfig(), SchedulerConfig()
    assert {name: getattr(engine, name) for name in SchedulerConfig.model_fields} == scheduler.model_dump()


def test_flags_that_are_not_given_set_nothing():
    assert given(EngineConfig, []) == {}
    assert given(SamplingParams, []) == {}


def test_sizes_of_memory_stay_as_typed():
    assert given(EngineConfig, ["--kv-memory", "256MiB"]) == {"kv_memory": "256MiB"}
    assert given(EngineConfig, ["--kv-memory", "1000000"]) == {"kv_memory": 1_000_000}


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return path

    return write


def test_a_flag_beats_the_file_even_with_the_default_value(file):
    path = file("model: m\nkv_precision: int8\nmax_batch_size: 4\ntemperature: 0.5\nstop: [x]\n")
    flags = {"kv_precision": "bf16", "kv_formats": ()}
    settings = settle(path, "other", flags, {"temperature": 0.0, "stop": ()})
    assert settings.model == "other"
    assert settings.config() == EngineConfig(max_batch_size=4)
    assert settings.sampling == {"temperature": 0.0, "stop": ["x"]}
    assert settle(path, None, {}).model == "m"
    assert settle(None, None, {}).model == DEFAULT_MODEL


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("kv_precison: int8", r"settings.yaml sets 'kv_precison'; it may set: model, models, weights, .*max_tokens"),
        ("1: 2\nfoo: 3", r"settings.yaml sets '1', 'foo'; it may set"),
        ("kv_precision: int7", r"kv_precision='int7': unknown KV precision"),
        ("weights: int2", r"weights='int2': input should be 'fp32', 'bf16', 'int8' or 'int4'"),
        ("model: 5", r"model=5 in .*settings.yaml is not text"),
        ("- a", r"must hold settings"),
        ("a: [", r"is not valid YAML"),
        ("", r"must hold settings"),
    ],
)
def test_a_file_with_a_mistake_is_refused_by_name(file, text, error):
    with pytest.raises(ConfigError, match=error):
        settle(file(text), None, {})


def test_a_file_that_is_missing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*none.yaml"):
        settle(tmp_path / "none.yaml", None, {})


def test_bad_sampling_values_are_refused_at_once(file):
    with pytest.raises(RequestError, match=r"temperature=-1\.0"):
        settle(None, None, {}, {"temperature": -1.0})
    with pytest.raises(RequestError, match="top_p=2"):
        settle(file("top_p: 2"), None, {})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_configurations_that_come_with_the_project_load(path):
    settings = settle(path, (), {})
    found = {**settings.engine, **settings.sampling, "model": settings.model, "models": settings.models}
    assert found.keys() >= yaml.safe_load(path.read_text()).keys()


def test_there_are_configurations():
    assert len(CONFIGS) >= 3
