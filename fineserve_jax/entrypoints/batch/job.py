"""The job itself: keeps the engine supplied with rows and writes each answer as soon as it is complete."""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.engine.supervisor import Supervisor
from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows, as_line
from fineserve_jax.entrypoints.batch.common_tokens import CommonTokens
from fineserve_jax.entrypoints.batch.delivery import Delivery
from fineserve_jax.entrypoints.batch.in_flight import RowInFlight, save_tokens, saved_tokens
from fineserve_jax.entrypoints.batch.intake import Intake, bad_row
from fineserve_jax.entrypoints.batch.interruption import Interruption
from fineserve_jax.entrypoints.batch.observers import JobObserver, Observers, RowOutcome
from fineserve_jax.entrypoints.batch.planning import RowPlan
from fineserve_jax.entrypoints.batch.requests import RowRequest, RowRequests
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow, unforeseen
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.errors import DeadEndError, EngineError, FineServeError, NonFiniteError, RequestError
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.validation import shortened

log = logging.getLogger(__name__)

# Waiting requests per row of a batch: enough for admission to choose from, few enough for a file of any length.
WAITING_PER_ROW = 4
PLANNED_PER_ROW = 16
"""Rows per row of a batch that are looked at for those that begin alike."""
MAX_ACCUSED = 3
"""Rows in turn with which the engine fails while it succeeds with none, until it is the engine that is to blame."""
ERROR_CODES = {NonFiniteError: "not_finite", DeadEndError: "dead_end"}


class BatchJob:
    """Answers rows with an engine that has nothing else to do.

    Args:
        engine: its `config.seed` and a row's place make the seed of a row that has none, so that a row's
            answer does not depend on what was answered before it.
        delivery: where answers go.
        sampling: fields of `SamplingParams` for rows that do not set them.
        max_retries: how often a row that makes the engine fail by itself is tried again.
        answer_rows: forms the answers.
        observers: told of all that happens.
        interruption: asked between steps whether the job is to end early.
    """

    def __init__(
        self,
        engine: Engine,
        delivery: Delivery,
        sampling: Mapping[str, Any] | None = None,
        *,
        max_retries: int = 2,
        answer_rows: AnswerRows | None = None,
        observers: Iterable[JobObserver] = (),
        interruption: Interruption | None = None,
    ) -> None:
        self.engine, self.delivery = engine, delivery
        self.summary = BatchSummary()
        self.observers = Observers(observers)
        self._requests = RowRequests(sampling, engine.config.seed)
        self._interruption = Interruption() if interruption is None else interruption
        self._answer_rows = answer_rows or AnswerRows(names_model=len(engine.models) > 1)
        self._supervisor, self._max_retries = Supervisor(engine, max_retries), max_retries
        self._accused: list[tuple[RowInFlight, str]] = []  # rows that the engine fails with, and what it says of them
        self._pending: dict[Request, RowInFlight] = {}
        self._stats = engine.stats()  # after the last step
        self._intake = Intake(delivery, self._answer_rows, self.summary, self.observers)
        self._shares = engine.config.prefix_cache != "off"
        self._plan = RowPlan(PLANNED_PER_ROW * engine.config.max_batch_size if self._shares else 1)
        self._common_tokens = CommonTokens(engine.config.page_size)

    def run(self, rows: Iterable[BatchRow | BadRow]) -> BatchSummary:
        """Answers all rows. A signal ends it early: `summary.interrupted`, with all complete rows written, and what
        the others have so far kept in the journal.

        Raises:
            FineServeError: the disk is full, or the engine fails whatever it is given.
        """
        start = time.perf_counter()
        try:
            with self.delivery.journal.explained():
                if self._answer_all(iter(rows)):
                    self.delivery.end_of_rows()
                else:
                    self.summary.interrupted = True
        except KeyboardInterrupt:
            self.summary.interrupted = True
        finally:
            self._stop()
            self.summary.seconds = time.perf_counter() - start
            self.observers.ended(self.summary)
        return self.summary

    def _answer_all(self, rows: Iterator[BatchRow | BadRow]) -> bool:
        """False if the job was asked to end before."""
        while not self._interruption:
            self._supply(rows)
            if self._pending:
                self._step()
                self._save()
            elif not self._interruption:
                self._convict()
                return True
        return False

    def _save(self, now: bool = False) -> None:
        """Commits what was answered, and the tokens of what is half done, if that is due, or in any case."""
        journal = self.delivery.journal
        if now or journal.is_due:
            with journal.counted():
                save_tokens(journal, self._rows_in_engine())
            self.delivery.save(now)

    def _stop(self) -> None:
        """Keeps what there is, and leaves the engine idle. What fails here must not hide why the job ends."""
        for leave in (self._keep_answers, self._keep_tokens, self._take_out_all):
            try:
                leave()
            except Exception as error:
                log.warning("the job could not be ended cleanly: %s: %s", type(error).__name__, error)

    def _keep_answers(self) -> None:
        with self.delivery.journal.explained():
            self.delivery.save(now=True)

    def _keep_tokens(self) -> None:
        self.engine.recover()  # an interrupt may have cut a step short
        with self.delivery.journal.explained():
            self._save(now=True)

    # -- rows in ---------------------------------------------------------------------------------------------------

    def _supply(self, rows: Iterator[BatchRow | BadRow]) -> None:
        """Fills the engine's queue, unless rows under suspicion are served by themselves."""
        if self._supervisor.isolates:
            return
        limit = WAITING_PER_ROW * self.engine.config.max_batch_size
        while self.engine.scheduler.num_waiting < limit and not self._interruption:
            if self._plan.has_room and (read := next(rows, None)) is not None:
                if isinstance(read, BadRow):
                    self._intake.fail(read)
                elif self._intake.admits(read):
                    self._plan.add(read)
            elif (row := self._plan.pop()) is not None:
                self._admit(row)
            else:
                return
            self._save()

    def _admit(self, row: BatchRow) -> None:
        try:
            served = self.engine.served(row.options.model)
            request = self._requests.request(row, served.tokenizer, served.max_seq_len)
            self._enter(row, request)
        except RequestError as error:
            self._intake.fail(bad_row(row, str(error)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            self._intake.fail(bad_row(row, unforeseen(error), "internal_error"))

    def _enter(self, row: BatchRow, request: RowRequest) -> None:
        """Puts a row into the engine, with the tokens it has. Raises `RequestError` if that does not serve it."""
        so_far = saved_tokens(self.delivery.journal, row.seq)
        samples = self.engine.queue(self.engine.prepare(*request), so_far)
        if self._shares:
            self.summary.common_tokens += self._common_tokens.note(samples[0], len(samples))
        had = [len(part.token_ids) for part in so_far]
        pending = RowInFlight(row, samples, had + [0] * (len(samples) - len(had)))
        for sample in pending.samples:
            self._pending[sample] = pending
        if so_far and pending.is_complete:  # it had come to its end, and its answer was not written
            self._finish(pending)

    def _rows_in_engine(self) -> list[RowInFlight]:
        return list(dict.fromkeys(self._pending.values()))

    # -- a step ----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        start = time.perf_counter()
        try:
            advanced = self.engine.step()
        except Exception as error:
            self._go_on_after(error)
            return
        seconds, before, after = time.perf_counter() - start, self._stats, self.engine.stats()
        self._stats = after
        self.summary.note_step(before, after, seconds)
        self._supervisor.note_progress(advanced)
        self._finish_complete(advanced)
        self._convict()
        self.observers.step(self.summary, after)

    def _finish_complete(self, requests: Iterable[Request]) -> None:
        """Writes those of the requests' rows all of whose samples are complete."""
        for request in requests:
            if request.status is not RequestStatus.FINISHED:
                continue
            pending = self._pending.get(request)  # none if a sample of the same row came before
            if pending is not None and pending.is_complete:
                self._finish(pending)

    # -- faults of the engine --------------------------------------------------------------------------------------

    def _go_on_after(self, error: Exception) -> None:
        """Goes on after a step that failed, without the rows that it is found to fail with."""
        fault = f"{type(error).__name__}: {shortened(str(error))}"
        try:
            self._supervisor.go_on_after(error)
        except Exception as fatal:
            raise FineServeError(
                f"the engine has failed: {fault}; it cannot go on: {fatal}; what is written is sound, so mend the "
                "cause and run the same command with --resume"
            ) from fatal
        known = [self._pending[one] for one in self.engine.computing if one in self._pending]
        computed = list(dict.fromkeys(known)) or self._rows_in_engine()
        for pending in computed:
            pending.attempts += 1
        self.summary.faults += 1
        self.observers.note(f"the engine has failed with {len(computed)} rows: {fault}; they are tried again")
        self._stats = self.engine.stats()
        for request in list(self._pending):
            if isinstance(request.error, EngineError) and request in self._pending:
                self._accuse(self._pending[request], fault)
        self._finish_complete(list(self._pending))

    def _accuse(self, pending: RowInFlight, fault: str) -> None:
        """The engine fails with a row by itself: it is to blame if the engine succeeds with another one.

        Raises:
            FineServeError: it fails whatever it serves.
        """
        self._take_out(pending)
        self._accused.append((pending, fault))
        if len(self._accused) == MAX_ACCUSED:
            raise FineServeError(
                f"the engine fails with every row that it is given: {fault}; what is written is sound, so mend the "
                "cause and run the same command with --resume"
            )

    def _convict(self) -> None:
        """Reports the rows that are to blame for faults."""
        accused, self._accused = self._accused, []
        for pending, fault in accused:
            error = f"the engine fails with this row, in each of {self._max_retries + 1} attempts by itself: {fault}"
            self._intake.fail(bad_row(pending.row, error, "engine_fault"))

    def _take_out(self, pending: RowInFlight) -> None:
        """Takes a row out of the engine."""
        for sample in pending.samples:
            del self._pending[sample]
            self.engine.abort(sample)
            self.engine.release(sample)
        self._supervisor.note_progress(pending.samples)

    def _take_out_all(self) -> None:
        for pending in self._rows_in_engine():
            self._take_out(pending)
        self._supervisor.reset()

    # -- answers out -----------------------------------------------------------------------------------------------

    def _finish(self, pending: RowInFlight) -> None:
        row, output = pending.row, self.engine.output(pending.samples)
        for request in pending.samples:
            del self._pending[request]
            self.engine.release(request)
        if errors := [sample.error for sample in pending.samples if sample.error is not None]:
            self._intake.fail(bad_row(row, str(errors[0]), ERROR_CODES.get(type(errors[0]), "internal_error")))
            return
        try:
            tokenizer = self.engine.models[output.model].tokenizer
            line = as_line(self._answer_rows.answer(row, output, tokenizer, pending.attempts))
        except Exception as error:
            self._intake.fail(bad_row(row, unforeseen(error), "internal_error"))
            return
        self.delivery.deliver(row.seq, False, line)
        tokens = tuple(len(sample.token_ids) for sample in output.outputs)
        self.summary.note_row(output.kv_precision, len(output.prompt_token_ids), sum(tokens))
        self.summary.late += any(sample.finish_reason == FinishReason.LATE for sample in output.outputs)
        if self.observers.take_rows:
            self.observers.row(_outcome(pending, output, tokens))


def _outcome(pending: RowInFlight, output: RequestOutput, tokens: tuple[int, ...]) -> RowOutcome:
    row = pending.row
    return RowOutcome(
        seq=row.seq,
        id=row.id,
        line=row.line,
        file=row.file,
        model=output.model,
        kv_precision=output.kv_precision,
        kv_tokens=output.kv_tokens,
        prompt_tokens=len(output.prompt_token_ids),
        output_tokens=tokens,
        finish_reasons=tuple(sample.finish_reason for sample in output.outputs),
        metrics=output.metrics,
        attempts=pending.attempts,
    )
