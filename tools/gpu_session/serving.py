"""A model on this device: what it says beside what XLA's programs say, and how fast it is served, in each KV format.

    python -m tools.gpu_session.serving --kv-precisions bf16 int8 int4

The last line is JSON; the exit status is 1 if what it says is wrong. Without `--model` the model has SmolLM2-135M's
shape and random weights, which take as long to multiply.
"""

import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import tokenizers
import tyro

from fineserve_jax.engine.bench import random_prompts, serve_at_once
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import LoadedModel, Tokenizer, load_model
from fineserve_jax.models import ModelConfig, random_params
from fineserve_jax.pallas_kernels.implementation import VARIABLE
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

# How far log-probabilities may lie apart: keys and values may round the other way where they are quantised.
TOLERANCES = {"fp32": 0.01, "bf16": 0.05, "fp16": 0.05}
OF_QUANTISED = 0.3


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str | None = None
    kv_precisions: tuple[str, ...] = ("bf16", "int8", "fp8", "int4", "bf16+int8+int4")
    """Those that are served; several joined by + are dealt out in turn."""
    weights: str = "bf16"
    rows: int = 128
    prompt_tokens: int = 512
    new_tokens: int = 128
    rounds: int = 3
    layers: int = 30
    """Of a random model."""
    checks: bool = True
    timings: bool = True


def main() -> int:
    arguments = tyro.cli(Arguments, description=__doc__)
    result: dict = {
        "device": jax.devices()[0].device_kind,
        "model": arguments.model or "random",
        "jax": jax.__version__,
    }
    if arguments.checks:
        formats = dict.fromkeys(name for case in arguments.kv_precisions for name in case.split("+"))
        result["checks"] = {name: check(model_of(arguments, "fp32"), name) for name in formats}
    if arguments.timings:
        model = model_of(arguments, arguments.weights)
        result["serving"] = {case: serve(arguments, model, case) for case in arguments.kv_precisions}
    print(json.dumps(result))
    return 0 if all(one["right"] for one in result.get("checks", {}).values()) else 1


def model_of(arguments: Arguments, weights: str) -> LoadedModel:
    if arguments.model is not None:
        return load_model(arguments.model, weights)
    config = ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        num_layers=arguments.layers,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        rope_theta=100000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        max_position=8192,
    )
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?")), eos_token_ids=())
    return LoadedModel("random", config, random_params(config, weights, seed=1, scale=0.05), tokenizer, weights)


def check(model: LoadedModel, kv_precision: str) -> dict:
    """Greedy tokens of this device's kernels against those of XLA's programs: the same up to the first that two
    candidates are about as likely for, with the same log-probabilities."""
    ours = generate(model, kv_precision)
    with implementation("xla"):
        expected = generate(model, kv_precision)
    tolerance, worst, compared, right = TOLERANCES.get(kv_precision, OF_QUANTISED), 0.0, 0, True
    for one, other in zip(ours, expected, strict=True):
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            first, second = list(theirs.top)[:2]
            if next(iter(mine.top)) != first:
                right &= theirs.top[first] - theirs.top[second] < 2 * tolerance
                break  # what follows is another text
            worst, compared = max(worst, abs(mine.logprob - theirs.logprob)), compared + 1
    return {"right": bool(right and worst < tolerance and compared), "largest_error": worst, "compared": compared}


def generate(model: LoadedModel, kv_precision: str) -> list[Request]:
    sizes = {"kv_memory": "256MiB", "max_batch_size": 8, "max_seq_len": 128, "max_chunk_tokens": 64}
    engine = Engine(model, EngineConfig(**sizes, prefix_cache="off"))
    sampling = SamplingParams(max_tokens=24, logprobs=2, ignore_eos=True)
    options = RequestOptions(kv_precision=kv_precision)
    prompts = random_prompts(model.config.vocab_size, 4, 50)
    requests = [engine.add_request(prompt, sampling, options) for prompt in prompts]
    while engine.has_unfinished:
        engine.step()
    for request in requests:
        if request.error is not None:
            raise request.error
    return requests


@contextmanager
def implementation(name: str) -> Iterator[None]:
    """Engines that are built meanwhile call that implementation's kernels."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def serve(arguments: Arguments, model: LoadedModel, case: str) -> dict:
    """Medians over the rounds, the first of which compiles and does not count."""
    length = arguments.prompt_tokens + arguments.new_tokens
    config = EngineConfig(max_batch_size=arguments.rows, max_seq_len=length, prefix_cache="off")
    engine = Engine(model, config)
    prompts = random_prompts(model.config.vocab_size, arguments.rows, arguments.prompt_tokens)
    formats = case.split("+")
    rounds = [serve_at_once(engine, prompts, formats, arguments.new_tokens) for _ in range(arguments.rounds + 1)][1:]
    return {
        "decode_tokens_per_s": statistics.median(one.decode_tokens_per_s or 0.0 for one in rounds),
        "prefill_tokens_per_s": statistics.median(one.prefill_tokens_per_s for one in rounds),
        "output_tokens_per_s": statistics.median(one.output_tokens_per_s for one in rounds),
    }


if __name__ == "__main__":
    sys.exit(main())
