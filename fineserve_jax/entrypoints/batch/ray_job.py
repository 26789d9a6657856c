"""A batch job on a Ray cluster: rows are read and answers written here, and engines elsewhere answer them.

    inputs, journal, output <-> RayJob --rows--> Ray Data's object store --> actors, an engine each
                                       <------------------- lines, outcomes

An actor that dies is replaced, and what it was answering is answered again. What is written is in the journal, so that
a job goes on after this process has ended as one without Ray does.
"""

import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows
from fineserve_jax.entrypoints.batch.delivery import Delivery
from fineserve_jax.entrypoints.batch.intake import Intake
from fineserve_jax.entrypoints.batch.interruption import Interruption
from fineserve_jax.entrypoints.batch.observers import JobObserver, Observers, RowOutcome
from fineserve_jax.entrypoints.batch.predictor import JobPredictor
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.errors import ConfigError, FineServeError
from fineserve_jax.kv.usage import KVCounts
from fineserve_jax.validation import Validated

MOST_RETRIES = 3
"""Of a task whose actor has died. More would go on for ever with a row that kills its process."""


ELSEWHERE = EngineStats({}, 0, KVCounts(0, 0, 0, 0, 0, 0, 0), 0, 0, 0, 0, 0.0, 0, 0, 0, None, {})
"""What is known here of engines in other processes: that they have made no step."""


class RayOptions(Validated):
    """Where the engines of a job on a Ray cluster are, and how many.

    Attributes:
        ray_address: of a cluster, or "auto" for the one that this machine belongs to; None: one that is started on this
            machine and ends with the job.
        ray_actors: how many engines.
        ray_gpus: that each engine takes.
        ray_cpus: that each engine takes.
        ray_rows_per_task: rows that an engine is handed at once; when it has answered all of them it takes the next.
    """

    ray_address: str | None = None
    ray_actors: int = Field(default=1, ge=1)
    ray_gpus: float = Field(default=0.0, ge=0.0)
    ray_cpus: float = Field(default=1.0, ge=0.0)
    ray_rows_per_task: int = Field(default=256, ge=1)


def import_ray() -> Any:
    """The package. Raises `ConfigError` where it is not installed."""
    try:
        import ray
        import ray.data
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'fineserve-jax[ray]'") from None
    return ray


def predictor_arguments(
    model: str | Path | Mapping[str, Any],
    config: EngineConfig,
    sampling: Mapping[str, Any],
    max_retries: int,
    make_engine: Callable[[], Engine] | None = None,
) -> dict[str, Any]:
    """The arguments of `JobPredictor` for a job; see `run_batch`. Raises `ConfigError` for files of a single engine."""
    for name in ("record", "step_profile"):
        if (path := getattr(config, name)) is not None:
            raise ConfigError(f"{name}={str(path)!r} is a file of one engine, and a cluster has several; leave it out")
    settings = config.model_dump(exclude_unset=True)
    own = {"model": model, "sampling": dict(sampling), "make_engine": make_engine, "max_retries": max_retries}
    return {**settings, **own}


class RayJob:
    """Answers rows by engines on a cluster.

    Args:
        ray: the package, see `import_ray`.
        options: where they are.
        predictor: arguments of `JobPredictor`, for each of them.
        delivery: where answers go.
        answer_rows: forms the answers.
        observers: told of all that happens; of a task's rows as of a step, with `ELSEWHERE`.
        interruption: asked between answers whether the job is to end early.
    """

    def __init__(
        self,
        ray: Any,
        options: RayOptions,
        predictor: Mapping[str, Any],
        delivery: Delivery,
        answer_rows: AnswerRows,
        observers: Iterable[JobObserver] = (),
        interruption: Interruption | None = None,
    ) -> None:
        self._ray, self.options, self.delivery, self.summary = ray, options, delivery, BatchSummary()
        self.observers = Observers(observers)
        self._intake = Intake(delivery, answer_rows, self.summary, self.observers)
        self._predictor = {**predictor, "answer_rows": answer_rows}
        self._interruption = Interruption() if interruption is None else interruption

    def run(self, rows: Iterable[BatchRow | BadRow]) -> BatchSummary:
        """Answers all rows. A signal ends it early: `summary.interrupted`, with all that was answered written.

        Raises:
            ConfigError: no cluster at the address.
            FineServeError: the disk is full, or workers die again and again.
        """
        start, own = time.perf_counter(), self._connect()
        try:
            with self.delivery.journal.explained():
                left = self._answer_all(rows)
                self.summary.interrupted = bool(self._interruption)
                if not self.summary.interrupted and left:
                    raise FineServeError(
                        f"{left} rows are not answered: the workers that had them died or failed again and again, see "
                        "Ray's logs; what is written is sound, and --resume tries them again"
                    )
                if not self.summary.interrupted:
                    self.delivery.end_of_rows()
        except KeyboardInterrupt:
            self.summary.interrupted = True
        finally:
            self.delivery.save(now=True)
            if own:
                self._ray.shutdown()
            self.summary.seconds = time.perf_counter() - start
            self.observers.ended(self.summary)
        return self.summary

    def _connect(self) -> bool:
        """Joins the cluster; whether it is one of our own."""
        ray = self._ray
        if ray.is_initialized():
            return False
        try:
            ray.init(self.options.ray_address, include_dashboard=False, log_to_driver=False, logging_level="error")
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"ray_address={self.options.ray_address!r}: no Ray cluster is there: {error}") from None
        ray.data.DataContext.get_current().enable_progress_bars = False
        return True

    def _answer_all(self, rows: Iterable[BatchRow | BadRow]) -> int:
        """Returns how many rows were handed over and are not answered."""
        context = self._ray.data.DataContext.get_current()
        context.max_errored_blocks = -1  # one that cannot be answered costs the others nothing
        blocks, handed_over = [], 0
        for block in self._blocks(rows):
            handed_over += block.num_rows
            blocks.append(self._ray.put(block))
        if not blocks:
            return 0
        options = self.options
        answers = self._ray.data.from_arrow_refs(blocks).map_batches(
            JobPredictor,
            fn_constructor_kwargs=self._predictor,
            batch_size=options.ray_rows_per_task,
            # One task at a time: a row that kills its actor again and again takes no other task along.
            compute=self._ray.data.ActorPoolStrategy(size=options.ray_actors, max_tasks_in_flight_per_actor=1),
            num_cpus=options.ray_cpus,
            num_gpus=options.ray_gpus,
            ray_remote_args_fn=lambda: {"max_restarts": -1, "max_task_retries": MOST_RETRIES},
        )
        for batch in answers.iter_batches(batch_size=None):
            for line, outcome in zip(batch["line"], batch["outcome"], strict=True):
                self._deliver(bytes(line), pickle.loads(outcome))
                handed_over -= 1
            self.delivery.save()
            self.observers.step(self.summary, ELSEWHERE)
            if self._interruption:
                break
        return handed_over

    def _blocks(self, rows: Iterable[BatchRow | BadRow]) -> Iterator[Any]:
        """The rows to be answered, as tables of a task's size, each made when it is wanted."""
        import pyarrow

        admitted = self._admitted(rows)
        while (taken := list(islice(admitted, self.options.ray_rows_per_task))) and not self._interruption:
            yield pyarrow.table({"seq": [row.seq for row in taken], "row": [pickle.dumps(row) for row in taken]})

    def _admitted(self, rows: Iterable[BatchRow | BadRow]) -> Iterator[BatchRow]:
        for row in rows:
            if isinstance(row, BadRow):
                self._intake.fail(row)
            elif self._intake.admits(row):
                yield row

    def _deliver(self, line: bytes, outcome: RowOutcome) -> None:
        failed = outcome.error is not None
        self.delivery.deliver(outcome.seq, failed, line)
        if failed:
            self.summary.note_error(outcome.code or "")
        else:
            self.summary.sampled_tokens += sum(outcome.output_tokens)
            self.summary.note_row(outcome.kv_precision, outcome.prompt_tokens, sum(outcome.output_tokens))
            self.summary.late += "late" in outcome.finish_reasons
        self.observers.row(outcome)
