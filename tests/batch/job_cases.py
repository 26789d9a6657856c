"""What tests of the batch job compare with."""

from fineserve_jax import SamplingParams
from fineserve_jax.request import RequestStatus
from fineserve_jax.request_options import RequestOptions

GREEDY = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}


def by_id(rows):
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def alone(engine, prompt, kv_precision, **sampling):
    """The text that the engine gives to a prompt with nothing else to do."""
    sampling = SamplingParams(**{**GREEDY, **sampling})
    request = engine.add_request(engine.tokenizer.encode(prompt), sampling, RequestOptions(kv_precision=kv_precision))
    while request.status is not RequestStatus.FINISHED:
        engine.step()
    text = engine.detokenizers[request].text
    engine.release(request)
    return text
