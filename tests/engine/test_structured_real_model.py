"""The real model answers a hundred schemas with JSON that is valid by them."""

import json

import pytest
from schema_cases import SCHEMAS, validator

from fineserve_jax import LLM, SamplingParams


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Not here: the programs are those that users run."""


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_parse_and_are_valid_unless_they_were_cut(temperature):
    llm = LLM("smollm2-135m", kv_memory="256MiB", max_batch_size=32, max_seq_len=512)
    prompts = [f"The JSON schema is {json.dumps(schema)}. An example of valid JSON:" for schema in SCHEMAS.values()]
    sampling = [
        SamplingParams(max_tokens=200, temperature=temperature, seed=i, structured_outputs={"json": schema})
        for i, schema in enumerate(SCHEMAS.values())
    ]
    kept = [i for i, prompt in enumerate(prompts) if len(llm.tokenizer.encode(prompt)) < 300]
    outputs = llm.generate([prompts[i] for i in kept], [sampling[i] for i in kept])
    cut = 0
    for output, i in zip(outputs, kept, strict=True):
        (sample,), schema = output.outputs, list(SCHEMAS.values())[i]
        assert sample.finish_reason in ("stop", "length"), sample.error
        if sample.finish_reason == "length":
            assert len(sample.token_ids) == 200
            cut += 1
        else:
            validator(schema).validate(json.loads(sample.text))
    assert cut <= 15
