"""What a batch job costs beside its engine: reading, checking, journalling and writing very many short rows.

    python benchmarks/batch_rows.py [--rows 1000000] [--ordered] [--openai]

In place of an engine stands one that answers every request in its first step with one and the same token, so that
nearly all the time is the job's own. The engine's part is measured by itself, by giving it as many requests without a
job, and left out of the rate; so is its memory, of the peak. With `--ordered` the engine answers every second request a
step later, so that answers have to wait for others.
"""

import dataclasses
import json
import resource
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tyro

from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch import run_batch
from fineserve_jax.entrypoints.batch.requests import RowRequest
from fineserve_jax.kv.usage import KVCounts
from fineserve_jax.request.request import RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

NOTHING = KVCounts(0, 0, 0, 0, 0, 0, 0)
METRICS = RequestMetrics(0.001, 0.002, 0.003, 0)
SAMPLE = CompletionOutput(0, "a", [7], None, "length")


@dataclasses.dataclass(frozen=True)
class Arguments:
    rows: int = 1_000_000
    batch: int = 256
    ordered: bool = False
    openai: bool = False


class Tokenizer:
    """Every prompt is three tokens."""

    def encode_prompt(self, text: str, max_tokens: int | None = None) -> list[int]:
        return [1, 2, 3]


class Answering:
    """A request, of which two things change: its status, and its one token. Compared by identity, as the engine's."""

    __slots__ = ("late", "num_output_tokens", "status")

    sampling, finish_reason, token_ids = SamplingParams(), None, (1, 2, 3, 7)
    num_prompt_tokens = num_shareable_tokens = 3
    error, logprobs, scores, prefix_root = None, list[Any](), None, b""

    def __init__(self, late: bool) -> None:
        self.late, self.num_output_tokens, self.status = late, 0, RequestStatus.WAITING


class InstantEngine:
    """Answers all that wait, `batch` of them in a step."""

    def __init__(self, batch: int, out_of_order: bool) -> None:
        self.config = SimpleNamespace(max_batch_size=batch, seed=0, prefix_cache="exact", page_size=16)
        self.model = SimpleNamespace(name="instant", tokenizer=Tokenizer(), max_seq_len=2048)
        self.models = {"instant": self.model}
        self.scheduler, self._batch, self._out_of_order = self, batch, out_of_order
        self._waiting: deque[Answering] = deque()
        self._late: list[Answering] = []
        self.row_limit: int | None = None
        self._count = self._steps = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def served(self, model: str | None = None) -> Any:
        return self.model

    def prepare(self, token_ids: list[int], sampling: SamplingParams, options: RequestOptions) -> list[int]:
        return token_ids

    def queue(self, prepared: list[int], so_far: Sequence[Any] = ()) -> list[Answering]:
        self._count += 1
        request = Answering(self._out_of_order and bool(self._count % 2))
        self._waiting.append(request)
        return [request]

    def step(self) -> list[Answering]:
        done, self._late = self._late, []
        for _ in range(min(self._batch, len(self._waiting))):
            request = self._waiting.popleft()
            request.num_output_tokens = 1
            (self._late if request.late else done).append(request)
        for request in done:
            request.status = RequestStatus.FINISHED
        self._steps += 1
        return done

    def output(self, samples: Sequence[Answering]) -> RequestOutput:
        return RequestOutput("r", None, [1, 2, 3], "instant", "bf16", {"bf16": 3}, [SAMPLE], METRICS)

    def release(self, request: Answering) -> None: ...

    def recover(self) -> None: ...

    def serve_only(self, requests: Sequence[Answering] | None) -> None: ...

    def stats(self) -> EngineStats:
        return EngineStats({}, 1, NOTHING, 0, 0, 0, self._count, 0.0, self._steps, 0, 0, None, {})


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "prompts.jsonl", Path(folder) / "answers.jsonl"
        write_rows(source, arguments)
        engine_s, engine_cpu_s = serve_alone(arguments)
        before_mib = peak_mib()
        start, cpu_start = time.perf_counter(), time.process_time()
        summary = run_batch(
            "instant",
            source,
            target,
            make_engine=lambda: InstantEngine(arguments.batch, arguments.ordered),
            ordered=arguments.ordered,
        )
        seconds, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        sizes = {path.name: path.stat().st_size >> 20 for path in Path(folder).iterdir()}
    if (summary.answered, summary.errors) != (arguments.rows, 0):
        sys.exit(f"{summary.answered} rows were answered, {summary.errors} were errors")
    rate = arguments.rows / (seconds - engine_s)
    result = {
        "rows_per_s": round(rate),
        "rows_per_cpu_s": round(arguments.rows / (cpu_s - engine_cpu_s)),
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "engine_s": round(engine_s, 1),
        "peak_mib": round(peak_mib()),
        "peak_above_engine_mib": round(peak_mib() - before_mib),
        "mib": sizes,
    }
    above, each = result["peak_above_engine_mib"], result["rows_per_cpu_s"]
    print(f"{rate:,.0f} rows/s, {each:,} for each second of the processor, {above} MiB above what the engine takes")
    print(json.dumps({**dataclasses.asdict(arguments), **result}))


def write_rows(path: Path, arguments: Arguments) -> None:
    with path.open("w") as file:
        for number in range(arguments.rows):
            body = {"prompt": "Water boils at", "max_tokens": 16, "temperature": 0}
            envelope = {"method": "POST", "url": "/v1/completions", "body": body}
            row = {"custom_id": f"row-{number}", **envelope} if arguments.openai else {"id": f"row-{number}", **body}
            file.write(json.dumps(row) + "\n")


def serve_alone(arguments: Arguments) -> tuple[float, float]:
    """Seconds that the engine takes for as many requests, as a job calls it; on the clock, and of the processor."""
    engine = InstantEngine(arguments.batch, arguments.ordered)
    request, answered = RowRequest([1, 2, 3], SamplingParams(), RequestOptions()), 0
    start, cpu_start = time.perf_counter(), time.process_time()
    while answered < arguments.rows:
        while engine.num_waiting < 4 * arguments.batch:
            engine.queue(engine.prepare(*request))
        for done in engine.step():
            engine.output([done])
            answered += 1
        engine.stats()
    return time.perf_counter() - start, time.process_time() - cpu_start


def peak_mib() -> float:
    """The largest memory that the process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
