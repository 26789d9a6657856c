"""Decode throughput of one engine, by the KV precision of its rows.

    python benchmarks/throughput.py --rows 32 --prompt-tokens 128 --new-tokens 64

The cases (all rows in one precision, and a mix) take turns, so that a busy machine slows all of them alike. Printed are
the medians over the rounds, their ratios to the first case, and a line of JSON. Decode tokens per second count the
steps from when every row has its first token until the first row ends, so that all rows decode in each of them; prefill
tokens per second count the steps before. The limit that the matrix products set stands beside them: every weight's
multiply and add for each row, at the rate that plain products of the same shapes reach on this machine.
"""

import dataclasses
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
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
    rows: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 64
    rounds: int = 5
    cases: tuple[str, ...] = ("bf16", "int8", "int4", "bf16+int8+int4")
    """KV precisions of the rows; several joined by + are dealt out in turn. "/uniform" behind them sets slab_policy."""
    kv_memory: str = "512MiB"
    max_chunk_tokens: int = 256


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    # An engine each: programs of one case do not carry the loops that only another needs.
    engines = {case: Engine(model, settings(arguments, case)) for case in arguments.cases}
    prompts = random_prompts(model.config.vocab_size, arguments.rows, arguments.prompt_tokens)
    for case, engine in engines.items():
        serve_at_once(engine, prompts, formats_of(case), arguments.new_tokens)  # compiles
    compiled = sum(engine.stats().num_compilations for engine in engines.values())
    speeds: dict[str, list[Served]] = {case: [] for case in engines}
    for _ in range(arguments.rounds):
        for case, engine in engines.items():
            speeds[case].append(serve_at_once(engine, prompts, formats_of(case), arguments.new_tokens))
    limit = arguments.rows / product_seconds(model.config.hidden_size, engines, arguments)
    report(arguments, speeds, limit, sum(e.stats().num_compilations for e in engines.values()) - compiled)


def settings(arguments: Arguments, case: str) -> EngineConfig:
    """Every round computes the same prompts, so nothing may be cached from one to the next."""
    _, _, policy = case.partition("/")
    return EngineConfig(
        kv_memory=arguments.kv_memory,
        max_batch_size=arguments.rows,
        max_seq_len=arguments.prompt_tokens + arguments.new_tokens,
        max_chunk_tokens=arguments.max_chunk_tokens,
        prefix_cache="off",
        slab_policy=policy or "elastic",
    )


def formats_of(case: str) -> list[str]:
    return case.partition("/")[0].split("+")


def product_seconds(hidden: int, engines: dict[str, Engine], arguments: Arguments) -> float:
    """Seconds that a step's matrix products take on their own, all layers and the output head."""
    engine = next(iter(engines.values()))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((max(arguments.rows, 8), hidden)), jnp.float32)
    matrices = [leaf for leaf in jax.tree.leaves(engine.runner.params) if leaf.ndim == 2]

    @jax.jit
    def products(x: jax.Array, matrices: list[jax.Array]) -> list[jax.Array]:
        outputs = []
        for matrix in matrices:
            wide = jnp.tile(x, (1, -(-matrix.shape[1] // hidden)))[:, : matrix.shape[1]].astype(matrix.dtype)
            contract_last = (((1,), (1,)), ((), ()))
            kind = jnp.int32 if matrix.dtype == jnp.int8 else jnp.float32
            product = jax.lax.dot_general(wide, matrix, contract_last, preferred_element_type=kind)
            outputs.append(product.max())  # keep the product, drop its size
        return outputs

    jax.block_until_ready(products(x, matrices))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(products(x, matrices))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def report(arguments: Arguments, speeds: dict[str, list[Served]], limit: float, compilations: int) -> None:
    decode = {case: statistics.median(s.decode_tokens_per_s or 0.0 for s in runs) for case, runs in speeds.items()}
    prefill = {case: statistics.median(s.prefill_tokens_per_s for s in runs) for case, runs in speeds.items()}
    first = next(iter(decode.values()))
    table = Table("KV precision", "prefill tokens/s", "decode tokens/s", "ratio", "of the products' limit")
    for case in decode:
        share = f"{decode[case] / limit:.0%}"
        table.add_row(case, f"{prefill[case]:.0f}", f"{decode[case]:.0f}", f"{decode[case] / first:.2f}", share)
    Console().print(table)
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "decode_tokens_per_s": {case: round(value, 1) for case, value in decode.items()},
                "prefill_tokens_per_s": {case: round(value, 1) for case, value in prefill.items()},
                "product_limit_tokens_per_s": round(limit, 1),
                "compilations_after_warm_up": compilations,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main()
