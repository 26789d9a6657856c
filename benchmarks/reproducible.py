"""What `reproducible` costs: the same prompts served by an engine with it, and by one without.

    python benchmarks/reproducible.py --rows 32 --prompt-tokens 16 128 512

Engines take turns, so that a busy machine slows both alike. For each length of the prompts, and for a full batch and a
single row, printed are the medians over the rounds of prefill and decode tokens per second (see `throughput.py`) and of
all output tokens over all time, each beside its ratio to the engine without; and a line of JSON. With a single row the
engine without computes a small step, and the one with it a full one: there it costs most.
"""

import dataclasses
import json
import statistics

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.bench import Served, random_prompts, serve_at_once
from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import load_model


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    kv_precision: str = "bf16"
    rows: int = 32
    prompt_tokens: tuple[int, ...] = (16, 128, 512)
    new_tokens: int = 64
    rounds: int = 5
    kv_memory: str = "512MiB"
    max_chunk_tokens: int = 256


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    engines = {kind: Engine(model, settings(arguments, kind)) for kind in (False, True)}
    table = Table("prompt tokens", "rows", "reproducible", "prefill/s", "decode/s", "output/s", "of without")
    figures = []
    for prompt_tokens in arguments.prompt_tokens:
        for rows in dict.fromkeys((1, arguments.rows)):
            prompts = random_prompts(model.config.vocab_size, rows, prompt_tokens)
            runs = take_turns(engines, prompts, arguments)
            rates = {kind: medians(of_kind) for kind, of_kind in runs.items()}
            for kind, own in rates.items():
                ratio = own["output"] / rates[False]["output"]
                values = (f"{value:.1f}" for value in own.values())
                table.add_row(str(prompt_tokens), str(rows), "yes" if kind else "no", *values, f"{ratio:.2f}")
            figures.append({"prompt_tokens": prompt_tokens, "rows": rows, "without": rates[False], "with": rates[True]})
    Console().print(table)
    print(json.dumps({**dataclasses.asdict(arguments), "rates": figures, "device": jax.devices()[0].device_kind}))


def settings(arguments: Arguments, reproducible: bool) -> EngineConfig:
    """Every round computes the same prompts, so nothing may be cached from one to the next."""
    return EngineConfig(
        reproducible=reproducible,
        kv_precision=arguments.kv_precision,
        kv_formats=[arguments.kv_precision],
        kv_memory=arguments.kv_memory,
        max_batch_size=arguments.rows,
        max_seq_len=max(arguments.prompt_tokens) + arguments.new_tokens,
        max_chunk_tokens=arguments.max_chunk_tokens,
        prefix_cache="off",
    )


def take_turns(engines: dict[bool, Engine], prompts: list[list[int]], arguments: Arguments) -> dict[bool, list[Served]]:
    """The runs of each engine, after one that compiles."""
    runs: dict[bool, list[Served]] = {kind: [] for kind in engines}
    for number in range(arguments.rounds + 1):
        for kind, engine in engines.items():
            served = serve_at_once(engine, prompts, [arguments.kv_precision], arguments.new_tokens)
            if number:
                runs[kind].append(served)
    return runs


def medians(runs: list[Served]) -> dict[str, float]:
    """Tokens per second, by what they are."""
    return {
        "prefill": statistics.median(run.prefill_tokens_per_s for run in runs),
        "decode": statistics.median(run.decode_tokens_per_s or 0.0 for run in runs),
        "output": statistics.median(run.output_tokens_per_s for run in runs),
    }


if __name__ == "__main__":
    main()
