"""An engine at work: all its requests decode, greedily, and will for as many tokens as a benchmark asks for."""

from collections.abc import Sequence

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import load_model
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams


def start_decoding(
    model: str,
    weights: str,
    config: EngineConfig,
    prompts: Sequence[list[int]],
    kv_precisions: Sequence[str],
    new_tokens: int,
) -> tuple[Engine, list[Request]]:
    """The engine, and its requests, each of which has two tokens or more.

    Args:
        kv_precisions: dealt out to the prompts in turn.
        new_tokens: of each; the first rows decode while the last are prefilled.
    """
    engine = Engine(load_model(model, weights), config)
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True, temperature=0.0)
    requests = []
    for row, prompt in enumerate(prompts):
        options = RequestOptions(kv_precision=kv_precisions[row % len(kv_precisions)])
        requests.append(engine.add_request(prompt, sampling, options))
    while any(request.num_output_tokens < 2 for request in requests):
        engine.step()
    return engine, requests
