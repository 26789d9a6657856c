"""fineserve_jax, by its engine."""

import itertools
import time
from collections.abc import Sequence

from benchmarks.peers.worker import Serve
from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import load_model
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

VERSIONS_OF = ("jax",)


def start(model: str, weights: str, kv_precision: str, max_rows: int, max_tokens: int) -> Serve:
    """`kv_precision`: of the prompts; several joined by + are dealt out in turn."""
    use_compilation_cache()
    config = EngineConfig(kv_memory="1GiB", max_batch_size=max_rows, max_seq_len=max_tokens, prefix_cache="off")
    engine = Engine(load_model(model, weights), config)
    formats = kv_precision.split("+")
    options = [RequestOptions(kv_precision=name) for name in formats]
    calls = itertools.count()

    def serve(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[float]]:
        if next(calls) == 1:  # the first call is the start to the first token; what follows is served warm
            engine.warm_up(formats)
        begun = time.perf_counter()
        requests = [
            engine.add_request(prompt, SamplingParams(max_tokens=length, ignore_eos=True), own)
            for prompt, length, own in zip(prompts, lengths, itertools.cycle(options))
        ]
        times: dict = {request: [] for request in requests}
        while engine.has_unfinished:
            advanced = engine.step()
            now = time.perf_counter() - begun
            for request in advanced:
                times[request] += [now] * (request.num_output_tokens - len(times[request]))
        for request in requests:
            engine.release(request)
            if request.error is not None:
                raise request.error
        return list(times.values())

    return serve
