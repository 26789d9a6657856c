"""What a run came to, as tables."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.peers.sides import PEERS
from fineserve_jax.engine.bench import Served


@dataclasses.dataclass(frozen=True)
class Figures:
    """Medians over the rounds: tokens a second, while all rows decode and until all have their first token; seconds
    to the median row's first token."""

    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    ttft_s: float

    @classmethod
    def of(cls, rounds: Sequence[Served]) -> "Figures":
        return cls(
            statistics.median(one.decode_tokens_per_s or 0.0 for one in rounds),
            statistics.median(one.prefill_tokens_per_s for one in rounds),
            statistics.median(statistics.median(one.first_s) for one in rounds),
        )


@dataclasses.dataclass
class Results:
    """All figures of a run, by the names of the sides.

    Attributes:
        machine: the processor, its cores and instruction sets.
        serving: by "rows x prompt tokens".
        offline_tokens: of all prompts, and of all answers.
        offline_tokens_per_s: output tokens over the whole time, round by round.
    """

    machine: str
    command: str
    serving: dict[str, dict[str, Figures]] = dataclasses.field(default_factory=dict)
    start_up_s: dict[str, float] = dataclasses.field(default_factory=dict)
    peak_memory_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    offline_prompts: int = 0
    offline_tokens: tuple[int, int] = (0, 0)
    offline_tokens_per_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def note(self, side: str, versions: Mapping[str, str], peak_memory_bytes: int) -> None:
        """What a process told of itself at its end."""
        self.versions |= versions
        self.peak_memory_bytes[side] = peak_memory_bytes


@dataclasses.dataclass(frozen=True)
class _Rates:
    """A table of rates, larger being better: of each side a number in each column; None: not measured."""

    title: str
    columns: list[str]
    rates: dict[str, list[float | None]]

    def rows(self) -> list[list[str]]:
        """Each side's rates; of ours beside them the ratio to the better of vLLM and llama.cpp."""
        marks = [
            max((row[i] for side, row in self.rates.items() if _sets_the_mark(side) and row[i]), default=None)
            for i in range(len(self.columns))
        ]
        return [
            [side, *(_cell(rate, None if side in PEERS else mark) for rate, mark in zip(row, marks, strict=True))]
            for side, row in self.rates.items()
        ]


def _sets_the_mark(side: str) -> bool:
    return side.startswith(("vllm", "llama"))


def _cell(rate: float | None, mark: float | None) -> str:
    if rate is None:
        return ""
    return f"{rate:.0f}" if mark is None else f"{rate:.0f} ({rate / mark:.2f})"


def _rates(results: Results) -> list[_Rates]:
    def by_shape(title: str, figure: Callable[[Figures], float]) -> _Rates:
        sides = next(iter(results.serving.values()))
        rates = {side: [figure(own[side]) for own in results.serving.values()] for side in sides}
        return _Rates(title, [f"{shape} tokens" for shape in results.serving], rates)

    tables = []
    if results.serving:
        tables += [
            by_shape("Decode, tokens a second", lambda own: own.decode_tokens_per_s),
            by_shape("Prefill, tokens a second", lambda own: own.prefill_tokens_per_s),
        ]
    if results.offline_tokens_per_s:
        medians = {side: [statistics.median(rates)] for side, rates in results.offline_tokens_per_s.items()}
        tokens = "{} prompts, {} + {} tokens".format(results.offline_prompts, *results.offline_tokens)
        tables.append(_Rates("Offline batch, output tokens a second", [tokens], medians))
    return tables


def _others(results: Results) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of what is better when it is smaller."""
    columns = [f"first token, {shape} (s)" for shape in results.serving]
    columns += ["start to first token (s)", "peak memory (GiB)"]
    rows = []
    for side, peak in results.peak_memory_bytes.items():
        firsts = [f"{own[side].ttft_s:.2f}" for own in results.serving.values()]
        start = results.start_up_s.get(side)
        rows.append([side, *firsts, "" if start is None else f"{start:.1f}", f"{peak / 2**30:.2f}"])
    return columns, rows


def show(results: Results) -> None:
    """Prints the tables."""
    console = Console(highlight=False)
    tables = [(one.title, one.columns, one.rows()) for one in _rates(results)]
    for title, columns, rows in [*tables, ("Seconds and memory", *_others(results))]:
        table = Table("", *columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(results.machine)


def markdown(results: Results) -> str:
    """The page: what was measured, how, and the tables."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    parts = [HEAD.format(machine=results.machine, command=results.command, versions=versions)]
    parts += [f"## {one.title}\n\n{_pipes(one.columns, one.rows())}" for one in _rates(results)]
    parts.append(f"## Seconds and memory\n\n{_pipes(*_others(results))}")
    return "\n\n".join(parts) + "\n"


def _pipes(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


HEAD = """# Beside other engines on a CPU

SmolLM2-135M from one GGUF file (Q4_1), on {machine}; {versions}. Written by

```
{command}
```

The engines take turns, so that a busy machine slows all of them alike; medians over the rounds. All answer the same
prompts of token ids, greedily, with the same number of tokens, and cache nothing between rounds. `ours A/B` has weights
in A and KV caches in B; vLLM and transformers have both in bf16, llama.cpp weights in what its name says and caches in
f16, with q8_0 in q8_0. Prompts are random but in the offline batch, where all wait from the beginning on and a prompt
takes the place of one that has ended. In brackets stand the ratios to the better of vLLM and llama.cpp, each at its
best. Prefill counts until every row has its first token, decode from then on until the first one ends. Start-up is with
warm caches of what is compiled."""
