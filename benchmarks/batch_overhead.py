"""What a batch job costs over `LLM.generate` with the same prompts, on the same engine: files, journal and all.

    python benchmarks/batch_overhead.py --rows 256 --new-tokens 64

Both take turns. Beside the median of their ratio stands what each took of the processor, per output token, which a busy
machine changes less than it does the time.
"""

import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax import LLM, SamplingParams
from fineserve_jax.engine.bench import random_prompts
from fineserve_jax.entrypoints.batch import run_batch


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    rows: int = 256
    batch: int = 32
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 5
    kv_memory: str = "512MiB"


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    longest = arguments.prompt_tokens + arguments.new_tokens
    with LLM(
        arguments.model,
        weights=arguments.weights,
        kv_memory=arguments.kv_memory,
        max_batch_size=arguments.batch,
        max_seq_len=longest,
        prefix_cache="off",
    ) as llm:
        vocabulary = llm.engine.model.config.vocab_size
        prompts = random_prompts(vocabulary, arguments.rows, arguments.prompt_tokens)
        report(arguments, take_turns(llm, prompts, arguments))


def take_turns(llm: LLM, prompts: list[list[int]], arguments: Arguments) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each run, on the clock and of the processor, after one of each that compiles."""
    sampling = {"max_tokens": arguments.new_tokens, "ignore_eos": True}
    with tempfile.TemporaryDirectory() as folder:
        source, numbers = Path(folder) / "prompts.jsonl", itertools.count()
        source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

        def job() -> int:
            target = Path(folder) / f"answers-{next(numbers)}.jsonl"
            model, make_engine = arguments.model, lambda: llm.engine
            return run_batch(model, source, target, sampling=sampling, make_engine=make_engine).output_tokens

        def generate() -> int:
            outputs = llm.generate(prompts, SamplingParams(**sampling))
            return sum(len(output.outputs[0].token_ids) for output in outputs)

        cases: dict[str, Callable[[], int]] = {"generate": generate, "batch": job}
        runs: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for number in range(arguments.rounds + 1):
            for case, answer in cases.items():
                start, cpu_start = time.perf_counter(), time.process_time()
                tokens = answer()
                seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
                if tokens != arguments.rows * arguments.new_tokens:
                    sys.exit(f"{case}: {tokens} tokens, not {arguments.rows * arguments.new_tokens}")
                if number:
                    runs[case].append((seconds, cpu_s))
    return runs


def report(arguments: Arguments, runs: dict[str, list[tuple[float, float]]]) -> None:
    ratios = [[b / a for a, b in zip(*pair, strict=True)] for pair in zip(runs["generate"], runs["batch"], strict=True)]
    overhead, cpu_overhead = (statistics.median(column) - 1 for column in zip(*ratios, strict=True))
    tokens = arguments.rows * arguments.new_tokens
    table = Table("", "tokens/s", "processor, ms a token")
    figures = {}
    for case, of_case in runs.items():
        seconds, cpu_s = (statistics.median(column) for column in zip(*of_case, strict=True))
        figures[case] = {
            "tokens_per_s": round(tokens / seconds, 1),
            "cpu_ms_per_token": round(1000 * cpu_s / tokens, 4),
        }
        table.add_row(case, *(str(value) for value in figures[case].values()))
    Console().print(table)
    print(
        json.dumps(
            {
                **dataclasses.asdict(arguments),
                "runs": figures,
                "overhead": round(overhead, 4),
                "cpu_overhead": round(cpu_overhead, 4),
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main()
