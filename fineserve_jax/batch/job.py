"""The job itself: keeps the engine supplied with rows and writes each answer as soon as it is complete."""

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fineserve_jax.batch.answer_rows import answer_row
from fineserve_jax.batch.answers import AnswerFile
from fineserve_jax.batch.row_ids import RowId, id_key
from fineserve_jax.batch.rows import BadRow, BatchRow, prompt_tokens, row_sampling, unforeseen
from fineserve_jax.batch.summary import BatchSummary
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.errors import RequestError
from fineserve_jax.request import FinishReason, Request, RequestStatus
from fineserve_jax.validation import shown

# Waiting requests per row of a batch: enough for admission to choose from, few enough for a file of any length.
WAITING_PER_ROW = 4


@dataclass(slots=True)
class PendingRow:
    """A row whose samples are in the engine."""

    row: BatchRow
    samples: list[Request]


class BatchJob:
    """Answers rows with an engine that has nothing else to do.

    Args:
        engine: its `config.seed` and a row's line make the seed of a row that has none, so that a row's
            answer does not depend on what was answered before it.
        answers: open, and begun.
        sampling: fields of `SamplingParams` for rows that do not set them.
        on_step: called after every step with the summary so far and the output tokens sampled so far.
    """

    def __init__(
        self,
        engine: Engine,
        answers: AnswerFile,
        sampling: Mapping[str, Any] | None = None,
        on_step: Callable[[BatchSummary, int], None] | None = None,
    ) -> None:
        self.engine, self.answers, self.sampling, self.on_step = engine, answers, sampling or {}, on_step
        self.summary = BatchSummary()
        self._lines: dict[Hashable, int] = {}
        self._pending: dict[Request, PendingRow] = {}
        self._stats = engine.stats()  # after the last step

    def run(self, rows: Iterable[BatchRow | BadRow]) -> BatchSummary:
        """Answers all rows. Ctrl-C ends it early: `summary.interrupted`, with all complete rows written."""
        start = time.perf_counter()
        remaining = iter(rows)
        try:
            while self._supply(remaining) or self._pending:
                self._step()
        except KeyboardInterrupt:
            self.summary.interrupted = True
            self._finish_complete(list(self._pending))
        finally:
            for request in list(self._pending):
                self.engine.abort(request)
                self.engine.release(request)
            self.summary.seconds = time.perf_counter() - start
        return self.summary

    # -- rows in -----------------------------------------------------------------------------------------

    def _supply(self, rows: Iterator[BatchRow | BadRow]) -> bool:
        """Fills the engine's queue; False if there is nothing left to fill it with."""
        limit = WAITING_PER_ROW * self.engine.config.max_batch_size
        while self.engine.scheduler.num_waiting < limit:
            row = next(rows, None)
            if row is None:
                return False
            self._accept(row)
        return True

    def _accept(self, row: BatchRow | BadRow) -> None:
        """Puts a row into the engine, unless it is bad or was answered already."""
        if isinstance(row, BadRow):  # its id, perhaps only its line, stays free for a good row
            self._fail(row.line, row.id, row.error)
            return
        key = id_key(row.id)
        first = self._lines.setdefault(key, row.line)
        if first != row.line:
            self._fail(
                row.line,
                row.id,
                f"id {shown(row.id)} is that of line {first}; give every row an id of its own, or none",
            )
        elif key in self.answers.answered:
            self.summary.skipped += 1
        else:
            try:
                prepared = self._prepare(row)
            except RequestError as error:
                self._fail(row.line, row.id, str(error))
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
                self._fail(row.line, row.id, unforeseen(error))
            else:
                samples = self.engine.queue(prepared)
                self._pending |= dict.fromkeys(samples, PendingRow(row, samples))

    def _prepare(self, row: BatchRow) -> PreparedRequest:
        served = self.engine.served(row.options.model)
        tokens = prompt_tokens(row, served.tokenizer, served.max_seq_len - 1)
        sampling = row_sampling(row, self.sampling)
        if sampling.seed is None:
            seed = int(np.random.SeedSequence((self.engine.config.seed, row.line)).generate_state(1)[0])
            sampling = sampling.model_copy(update={"seed": seed})
        return self.engine.prepare(tokens, sampling, row.options)

    # -- answers out -------------------------------------------------------------------------------------

    def _step(self) -> None:
        start = time.perf_counter()
        advanced = self.engine.step()
        seconds, before, after = time.perf_counter() - start, self._stats, self.engine.stats()
        self._stats = after
        self.summary.note_step(before, after, seconds)
        self._finish_complete(advanced)
        if self.on_step is not None:
            self.on_step(self.summary, after.num_output_tokens)

    def _finish_complete(self, requests: Iterable[Request]) -> None:
        """Writes those of the requests' rows all of whose samples are complete."""
        for request in requests:
            pending = self._pending.get(request)  # none if a sample of the same row came before
            if pending is not None and all(s.status is RequestStatus.FINISHED for s in pending.samples):
                self._finish(pending)

    def _finish(self, pending: PendingRow) -> None:
        row, output = pending.row, self.engine.output(pending.samples)
        for request in pending.samples:
            del self._pending[request]
            self.engine.release(request)
        if errors := [sample.error for sample in output.outputs if sample.error is not None]:
            self._fail(row.line, row.id, errors[0])
            return
        tokenizer = self.engine.models[output.model].tokenizer
        answer = answer_row(row.id, output, tokenizer, names_model=len(self.engine.models) > 1)
        self.answers.write(answer)
        self.summary.note_row(output.kv_precision, answer["prompt_tokens"], answer["output_tokens"])
        self.summary.late += any(sample.finish_reason == FinishReason.LATE for sample in output.outputs)

    def _fail(self, line: int, row_id: RowId, error: str) -> None:
        self.summary.errors += 1
        if (line, error) not in self.answers.failed:  # else an earlier run has said so
            self.answers.write({"id": row_id, "line": line, "error": error})
