"""How fast completions are scored, beside how fast prompts are computed.

    python benchmarks/scoring.py --prompts 1000

In each round, `LLM.score` scores some completions of each prompt, and `LLM.generate` computes as many other prompts for
one token each; all are random, so that nothing is cached. A rate is of the tokens that there are to compute, a prompt's
once, over seconds; and over processor seconds, which a busy machine changes less. Printed are medians over the rounds,
and JSON.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax import LLM, SamplingParams
from fineserve_jax.engine.bench import random_prompts


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    kv_precision: str = "bf16"
    prompts: int = 1000
    prompt_tokens: int = 128
    completions: int = 4
    completion_tokens: int = 8
    rounds: int = 3
    kv_memory: str = "512MiB"
    max_chunk_tokens: int = 512


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    longest = arguments.prompt_tokens + arguments.completion_tokens
    llm = LLM(
        arguments.model,
        weights=arguments.weights,
        kv_precision=arguments.kv_precision,
        kv_formats=(arguments.kv_precision,),
        kv_memory=arguments.kv_memory,
        max_seq_len=longest,
        max_chunk_tokens=arguments.max_chunk_tokens,
    )
    llm.warm_up(prompt_logprobs=True)
    rates: dict[str, list[tuple[float, float]]] = {"score": [], "generate": []}
    for number in range(arguments.rounds):
        score, generate = one_round(llm, arguments, number)
        rates["score"].append(score)
        rates["generate"].append(generate)
    table = Table("", "tokens/s", "tokens/processor second")
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in rates.items()
    }
    for name, values in medians.items():
        table.add_row(name, *(f"{value:.1f}" for value in values))
    ratios = [score / generate for score, generate in zip(*medians.values(), strict=True)]
    table.add_row("score over generate", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)
    print(json.dumps({**dataclasses.asdict(arguments), **medians, "device": jax.devices()[0].device_kind}))


def one_round(llm: LLM, arguments: Arguments, number: int) -> list[tuple[float, float]]:
    """Rates of scoring and of computing prompts."""
    vocab_size, count, step = llm.engine.model.config.vocab_size, arguments.prompts, arguments.completions
    prompts, others = (random_prompts(vocab_size, count, arguments.prompt_tokens, seed=2 * number + i) for i in (0, 1))
    tokens = random_prompts(vocab_size, count * step, arguments.completion_tokens, seed=1000 + number)
    completions = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    of_prompts = count * arguments.prompt_tokens
    one_token = SamplingParams(max_tokens=1, ignore_eos=True)
    return [
        rate(of_prompts + len(tokens) * arguments.completion_tokens, lambda: llm.score(prompts, completions)),
        rate(of_prompts, lambda: llm.generate(others, one_token)),
    ]


def rate(num_tokens: int, run: Callable[[], object]) -> tuple[float, float]:
    """Tokens a second, and a processor second."""
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return num_tokens / (time.perf_counter() - wall), num_tokens / (time.process_time() - processor)


if __name__ == "__main__":
    main()
