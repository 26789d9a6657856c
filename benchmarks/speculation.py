"""One row with drafts by look-up beside the same without: text that repeats what it was given, and text that does not.

    python benchmarks/speculation.py --weights int8 --kv-precision int8

The two engines take turns. Printed are medians of decoded tokens a second, the steps that the answers took, and the
share of drafts that was accepted; the last line is JSON.
"""

import dataclasses
import json
import statistics
import time

import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.loaders import encode_chat, load_model
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

CODE = '''def area_of_square(side):
    """The area of a square."""
    return side * side

def area_of_circle(radius):
    """The area of a circle."""
    return 3.14159 * radius * radius

def area_of_triangle(base, height):
    """The area of a triangle."""
    return base * height / 2
'''
PEOPLE = "Alice Johnson, 34, Berlin\nBob Smith, 45, London\nCarla Gomez, 29, Madrid\nDmitri Ivanov, 51, Moscow"
TASKS = {
    "code": f"Repeat this code exactly, then stop:\n```python\n{CODE}```",
    "extraction": f"Copy the following list of people, one per line:\n{PEOPLE}\nEmi Tanaka, 38, Tokyo",
    "poem": "Write a short poem about the sea.",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "int8"
    kv_precision: str = "int8"
    num_speculative_tokens: int = 7
    new_tokens: int = 160
    rounds: int = 5


@dataclasses.dataclass(frozen=True)
class Answer:
    """tokens_per_s: behind the first. steps: of the whole answer. drafts, accepted: how many."""

    tokens_per_s: float
    steps: int
    drafts: int
    accepted: int


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    engines = {}
    for most in (0, arguments.num_speculative_tokens):
        config = EngineConfig(max_batch_size=8, max_seq_len=1024, prefix_cache="off", num_speculative_tokens=most)
        engines[most] = Engine(model, config)
        engines[most].warm_up([arguments.kv_precision])
    answers: dict[str, dict[int, list[Answer]]] = {task: {most: [] for most in engines} for task in TASKS}
    for _ in range(arguments.rounds):
        for task, text in TASKS.items():
            prompt = encode_chat(model.tokenizer, [{"role": "user", "content": text}])[1]
            for most, engine in engines.items():
                answers[task][most].append(answer(arguments, engine, prompt))
    report(arguments, answers)


def answer(arguments: Arguments, engine: Engine, prompt: list[int]) -> Answer:
    """Answers greedily, with as many tokens as asked."""
    before = engine.stats()
    sampling = SamplingParams(max_tokens=arguments.new_tokens, ignore_eos=True)
    request = engine.add_request(prompt, sampling, RequestOptions(kv_precision=arguments.kv_precision))
    while not request.num_output_tokens:
        engine.step()
    begun, first = time.perf_counter(), request.num_output_tokens
    while engine.has_unfinished:
        engine.step()
    seconds, after = time.perf_counter() - begun, engine.stats()
    engine.release(request)
    return Answer(
        (request.num_output_tokens - first) / seconds,
        after.num_steps - before.num_steps,
        after.num_drafts - before.num_drafts,
        after.num_accepted_drafts - before.num_accepted_drafts,
    )


def report(arguments: Arguments, answers: dict[str, dict[int, list[Answer]]]) -> None:
    table, results = Table("text", "without", "with drafts", "ratio", "steps", "accepted"), {}
    for task, by_most in answers.items():
        plain, drafted = by_most.values()
        without, rate = (statistics.median(one.tokens_per_s for one in own) for own in (plain, drafted))
        steps = statistics.median(one.steps for one in drafted)
        accepted = sum(one.accepted for one in drafted) / max(1, sum(one.drafts for one in drafted))
        table.add_row(task, f"{without:.1f}", f"{rate:.1f}", f"{rate / without:.2f}", f"{steps:.0f}", f"{accepted:.0%}")
        results[task] = {"without": without, "with": rate, "steps": steps, "accepted": accepted}
    console = Console(highlight=False)
    console.print(f"{processor_name()}; {arguments.weights} weights, {arguments.kv_precision} caches, tokens a second")
    console.print(table)
    print(json.dumps({**dataclasses.asdict(arguments), "machine": processor_name(), "tasks": results}))


if __name__ == "__main__":
    main()
