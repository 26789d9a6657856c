"""Tenants and their quotas, from the front door on a tiny model."""

import pytest
from engine_cases import random_model

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

TWENTY = SamplingParams(max_tokens=20, ignore_eos=True)
OPTIONS = {
    "max_seq_len": 128,
    "max_batch_size": 8,
    "max_chunk_tokens": 64,
    "kv_memory": "1MiB",
    "kv_formats": ("bf16", "int8"),
}


def test_quotas_change_when_tokens_come_but_not_which():
    quotas = {"tenant:alice": {"guaranteed": 0.5}, "tenant:bob": {"max": 0.4}}
    prompts, tenants = ["a" * length for length in (60, 50, 40, 30, 20, 10)], ["alice", "bob", ""] * 2
    plain, shared = (
        Engine(random_model(), EngineConfig(**OPTIONS)),
        Engine(random_model(), EngineConfig(**OPTIONS, quotas=quotas)),
    )
    texts = []
    for engine in (plain, shared):
        requests = [
            engine.add_request(engine.tokenizer.encode(prompt), TWENTY, RequestOptions(tenant=tenant))
            for prompt, tenant in zip(prompts, tenants, strict=True)
        ]
        account = engine.scheduler.quotas.account
        while engine.has_unfinished:
            engine.step()
            assert account is None or account.used["tenant:bob"] <= account.most["tenant:bob"]
        texts.append([engine.detokenizers[request].text for request in requests])
    assert texts[0] == texts[1]


def test_a_prompt_beyond_its_tenants_maximum_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr("fineserve_jax.engine.load.load_model", lambda *_: random_model())
    llm = LLM("tiny", **OPTIONS, quotas={"tenant:bob": {"max": 0.05}})
    with pytest.raises(RequestError, match=r"prompt 1: a request of up to 120 tokens.*quota 'tenant:bob' allows"):
        llm.generate(["a" * 10, "b" * 100], TWENTY, tenant=["", "bob"])
    assert not llm.engine.has_unfinished
    assert len(llm.generate(["b" * 100], TWENTY, tenant="alice")[0].outputs[0].token_ids) == 20


def test_quotas_do_not_go_with_fixed_pools():
    with pytest.raises(ConfigError, match="quotas have no meaning with slab_policy='partitioned'"):
        EngineConfig(slab_policy="partitioned", quotas={"tenant:a": {"max": 0.5}})
