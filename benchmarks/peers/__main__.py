"""The command line: see the package's docstring."""

import contextlib
import dataclasses
import itertools
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.peers.process import Process
from benchmarks.peers.prompts import read_prompts
from benchmarks.peers.report import Figures, Results, markdown, show
from benchmarks.peers.sides import PEERS, Side, our_sides, peer_sides
from fineserve_jax.engine.bench import random_prompts, served_at
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.loaders import fetch
from fineserve_jax.loaders.load import describe_model

Part = Literal["prepare", "start", "decode", "offline"]
LONGEST_REAL = 768  # tokens of a prompt of the offline batch and its answer
WARM_TOKENS = 3  # of each answer, when shapes are met for the first time


@dataclasses.dataclass(frozen=True)
class Arguments:
    only: tuple[Part, ...] = ("prepare", "start", "decode", "offline")
    """prepare: make environments and files, and start each engine once, so that its caches are there; start: seconds
    from a process's start to its first token; decode: rates of decoding and prefill, and time to first token, by rows
    and prompt tokens; offline: a batch of real prompts."""
    ours: tuple[str, ...] = ("bf16/bf16", "int8/int8", "int4/int8")
    """Weights/KV precision; several precisions joined by + are dealt out to the rows in turn."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Names of peers, or what they begin with; none: ours alone."""
    rows: tuple[int, ...] = (1, 8, 32)
    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: int = 64
    rounds: int = 3
    prompts: tuple[Path, ...] = (Path("examples/prompts.jsonl"),)
    """Files of the offline batch, a JSON object a line."""
    answer_tokens: int = 64
    """Of an offline prompt that does not say."""
    output: Path | None = None
    """Where the tables go as Markdown; by default docs/benchmarks.md if all parts and peers are run, else nowhere."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=sys.modules["benchmarks.peers"].__doc__)
    model = "smollm2-135m"
    gguf, described = fetch(model), describe_model(model)
    # The same whatever part is run, lest what was compiled for one part is compiled again for another.
    longest = max(LONGEST_REAL, max(arguments.prompt_tokens) + arguments.new_tokens)
    limits = {"max_rows": max(arguments.rows), "max_tokens": longest}
    sides = our_sides(arguments.ours, model, limits) + peer_sides(arguments.peers, gguf, limits)
    results = Results(processor_name(), shlex.join(["python", "-m", "benchmarks.peers", *sys.argv[1:]]))
    if "prepare" in arguments.only:
        _prepare(sides)
    if measured := set(arguments.only) - {"prepare"}:
        with contextlib.ExitStack() as stack:
            processes = _start(sides, stack, results if "start" in measured else None)
            if "decode" in measured:
                _decode(arguments, processes, described.config.vocab_size, results)
            if "offline" in measured:
                most, tokenizer = limits["max_tokens"], described.tokenizer
                batch = read_prompts(arguments.prompts, tokenizer, arguments.answer_tokens, most)
                _offline(arguments.rounds, processes, *batch, results)
            for process in processes:
                results.note(process.side.name, process.versions, process.peak_memory_bytes)
        show(results)
        if (output := _output(arguments)) is not None:
            output.write_text(markdown(results))
    print(json.dumps(dataclasses.asdict(results)))


def _output(arguments: Arguments) -> Path | None:
    all_of_it = set(arguments.only) == set(Arguments.only) and set(arguments.peers) == set(PEERS)
    return arguments.output or (Path("docs/benchmarks.md") if all_of_it else None)


def _prepare(sides: Sequence[Side]) -> None:
    """Starts each engine once, with all that it compiles at its start."""
    for side in sides:
        _note(f"{side.name} starts for the first time")
        with contextlib.closing(Process(side)) as process:
            process.ask(*_one_prompt())


def _start(sides: Sequence[Side], stack: contextlib.ExitStack, results: Results | None) -> list[Process]:
    """All processes, one after the other, each with its first token behind it."""
    processes = []
    for side in sides:
        _note(f"{side.name} starts")
        process = stack.enter_context(contextlib.closing(Process(side)))
        process.ask(*_one_prompt())
        if results is not None:
            results.start_up_s[side.name] = time.perf_counter() - process.begun
        processes.append(process)
    return processes


def _one_prompt() -> tuple[list[list[int]], list[int]]:
    return [list(range(1000, 1032))], [1]


def _decode(arguments: Arguments, processes: Sequence[Process], vocab_size: int, results: Results) -> None:
    """Random prompts of each length in each number; rounds take turns between the engines."""
    for rows, length in itertools.product(arguments.rows, arguments.prompt_tokens):
        prompts = random_prompts(vocab_size, rows, length)
        for process in processes:
            process.ask(prompts, [WARM_TOKENS] * rows)
        served: dict[str, list] = {process.side.name: [] for process in processes}
        for number in range(arguments.rounds):
            for process in processes:
                _note(f"{rows} x {length}, round {number + 1}: {process.side.name}")
                times = process.ask(prompts, [arguments.new_tokens] * rows)
                served[process.side.name].append(served_at(rows * length, times))
        results.serving[f"{rows} x {length}"] = {name: Figures.of(rounds) for name, rounds in served.items()}


def _offline(
    rounds: int, processes: Sequence[Process], prompts: list[list[int]], lengths: list[int], results: Results
) -> None:
    """A batch of real prompts, all of them waiting from the beginning on."""
    results.offline_prompts = len(prompts)
    results.offline_tokens = sum(map(len, prompts)), sum(lengths)
    for process in processes:
        process.ask(prompts[:8], [WARM_TOKENS] * len(prompts[:8]))
    for number in range(rounds):
        for process in processes:
            _note(f"offline batch, round {number + 1}: {process.side.name}")
            times = process.ask(prompts, lengths)
            rate = sum(lengths) / max(own[-1] for own in times)
            results.offline_tokens_per_s.setdefault(process.side.name, []).append(rate)


def _note(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
