"""The common case of several models: one real model with its weights in bf16 and in int8, in one memory."""

import pytest

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.llm import LLM
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

OPTIONS = {"kv_memory": "64MiB", "max_batch_size": 8, "max_seq_len": 256, "max_chunk_tokens": 64}
MODELS = {"exact": "smollm2-135m", "fast": {"model": "smollm2-135m", "weights": "int8"}}
PROMPTS = ["The capital of France is", "Water boils at", "def add(a, b):\n    return", "The opposite of hot is"]
FORMATS = ["bf16", "int8", "int4"]
# Where the two best logits are this close, either may win: sums are taken in another order beside other rows.
NEAR_TIE = 0.3


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Not here: the programs are those that users run."""


def serve(engine: Engine, rows: list[tuple[str, str, str]]) -> list[Request]:
    """Serves (prompt, KV format, model) rows together."""
    sampling = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=2)
    requests = [
        engine.add_request(
            engine.models[model].tokenizer.encode_prompt(prompt),
            sampling,
            RequestOptions(kv_precision=name, model=model),
        )
        for prompt, name, model in rows
    ]
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    return requests


def test_two_precisions_of_one_model_answer_side_by_side_as_they_do_alone():
    engine = LLM(models=MODELS, **OPTIONS).engine
    alone = {name: Engine({name: served.model}, EngineConfig(**OPTIONS)) for name, served in engine.models.items()}
    for served in [*engine.models.values(), *(own.served() for own in alone.values())]:
        served.runner.use_formats(FORMATS)
    rows = [(prompt, FORMATS[i % 3], name) for i, prompt in enumerate(PROMPTS) for name in MODELS]
    together = serve(engine, rows)
    for row, request in zip(rows, together, strict=True):
        (expected,) = serve(alone[row[2]], [row])
        pairs = zip(expected.output_token_ids, request.output_token_ids, strict=True)
        if differing := [i for i, (ours, theirs) in enumerate(pairs) if ours != theirs]:
            best, second = expected.logprobs[differing[0]].top.values()
            assert best - second <= NEAR_TIE, (row, differing[0])
    for request in together[:2]:  # the one answer of which this small model is sure
        assert "Paris" in engine.detokenizers[request].text
    assert engine.stats().models["exact"].weights == "bf16"
    assert engine.stats().models["fast"].weights == "int8"
