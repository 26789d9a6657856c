"""`fineserve-jax bench`: how fast a model is served here."""

import json
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.bench import Served, percentiles, random_prompts, serve_at_once
from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import BenchFlags, ConfigFlag, ModelFlag, settle
from fineserve_jax.errors import ConfigError
from fineserve_jax.loaders import load_model
from fineserve_jax.runner.mesh import device_group

LATENCIES = {"ttft_s": "first token", "itl_s": "between tokens", "e2e_s": "whole answer"}


def bench(
    *,
    requests: int = 32,
    prompt_tokens: int = 128,
    output_tokens: int = 64,
    rounds: int = 3,
    kv_precisions: Annotated[tuple[str, ...], tyro.conf.arg(name="kv-precision")] = ("bf16", "int8", "int4"),
    as_json: Annotated[Switch, tyro.conf.arg(name="json", help_behavior_hint="")] = False,
    model: ModelFlag = None,
    config: ConfigFlag = None,
    engine: BenchFlags,
) -> None:
    """Measure how fast a model is served on this machine: tokens a second, and percentiles of latencies.

    Prompts of random tokens are served all at once. Cases take turns, so that a busy machine slows all of them alike;
    a first round, which compiles, does not count. Rates are medians over the rounds.

    Args:
        requests: prompts that are served at once; also --max-batch-size, unless that is given.
        prompt_tokens: of each.
        output_tokens: of each answer.
        rounds: how often each case is measured.
        kv_precisions: the cases, a KV precision each; several joined by + are dealt out in turn: bf16+int8+int4.
        as_json: print one JSON object instead of tables.
        model: alias, .gguf file, Hugging Face directory or converted directory; or a name among the `models` of the
            file.
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    _check_numbers(requests=requests, prompt_tokens=prompt_tokens, rounds=rounds)
    if output_tokens < 2:
        raise ConfigError(f"--output-tokens {output_tokens}: give at least 2, between which there is a time")
    settings = settle(config, model, engine)
    sizes = {"max_batch_size": requests, "max_seq_len": prompt_tokens + output_tokens}
    own = {name: size for name, size in sizes.items() if name not in settings.engine}
    configs = {
        case: settings.config(**own, prefix_cache="off", kv_precision=case.split("+")[0]) for case in kv_precisions
    }
    begun = time.perf_counter()
    use_compilation_cache()
    plain = settings.config()
    loaded = load_model(settings.model, plain.weights, device_group(plain.tensor_parallel))
    # An engine each: programs of one case do not carry the loops that only another needs.
    engines = {case: Engine(loaded, configs[case]) for case in configs}
    prompts = random_prompts(loaded.config.vocab_size, requests, prompt_tokens)
    _round(engines, prompts, output_tokens, f"compiling, {len(engines)} cases")
    start_up_s, compiled = time.perf_counter() - begun, _num_compilations(engines)
    served = [_round(engines, prompts, output_tokens, f"round {i + 1} of {rounds}") for i in range(rounds)]
    result = {
        "model": settings.model,
        "weights": loaded.weights,
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": rounds,
        "cases": {case: _figures([measured[case] for measured in served]) for case in engines},
        "start_up_s": start_up_s,
        "compilations_after_warm_up": _num_compilations(engines) - compiled,
        **_machine(),
    }
    if as_json:
        print(json.dumps(result))
    else:
        _show(result)


def _check_numbers(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give at least 1")


def _round(
    engines: Mapping[str, Engine], prompts: Sequence[Sequence[int]], output_tokens: int, shown: str
) -> dict[str, Served]:
    print(shown, file=sys.stderr, flush=True)
    return {case: serve_at_once(engine, prompts, case.split("+"), output_tokens) for case, engine in engines.items()}


def _machine() -> dict[str, Any]:
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "device": jax.devices()[0].device_kind,
        "processor": processor_name(),
        "jax": jax.__version__,
    }


def _num_compilations(engines: Mapping[str, Engine]) -> int:
    return sum(engine.stats().num_compilations for engine in engines.values())


def _figures(rounds: Sequence[Served]) -> dict[str, Any]:
    return {
        "prefill_tokens_per_s": statistics.median(one.prefill_tokens_per_s for one in rounds),
        "decode_tokens_per_s": _median_of_all([one.decode_tokens_per_s for one in rounds]),
        "output_tokens_per_s": statistics.median(one.output_tokens_per_s for one in rounds),
        "ttft_s": percentiles(one.first_s for one in rounds),
        "itl_s": percentiles(one.gaps_s for one in rounds),
        "e2e_s": percentiles(one.total_s for one in rounds),
    }


def _median_of_all(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if len(known) == len(values) else None


def _show(result: Mapping[str, Any]) -> None:
    console = Console()
    asked = "{requests} requests of {prompt_tokens} + {output_tokens} tokens, {model} in {weights}".format(**result)
    rates = Table("KV precision", "prefill", "decode", "all", title=f"Tokens a second: {asked}")
    latencies = Table("KV precision", "milliseconds", "p50", "p90", "p99", title="Latencies")
    for case, figures in result["cases"].items():
        shown = (figures[f"{name}_tokens_per_s"] for name in ("prefill", "decode", "output"))
        rates.add_row(case, *("-" if rate is None else f"{rate:.0f}" for rate in shown))
        for key, name in LATENCIES.items():
            latencies.add_row(case, name, *(f"{1000 * seconds:.1f}" for seconds in figures[key].values()))
    console.print(rates, latencies)
    console.print(
        f"{result['processor']}; device {result['device']}; JAX {result['jax']}. Loading and compiling took "
        f"{result['start_up_s']:.1f} s, {result['compilations_after_warm_up']} programs were compiled later; at most "
        f"{result['peak_memory_bytes'] / 2**30:.2f} GiB of memory were in use.",
        highlight=False,
    )
