"""The job itself: keeps the engine supplied with rows and writes each answer as soon as it is complete."""

import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fineserve_jax.batch.answer_rows import AnswerRows, as_line
from fineserve_jax.batch.delivery import Delivery
from fineserve_jax.batch.in_flight import RowInFlight, save_tokens, saved_tokens
from fineserve_jax.batch.intake import Intake, bad_row
from fineserve_jax.batch.interruption import Interruption
from fineserve_jax.batch.isolation import Isolation
from fineserve_jax.batch.observers import JobObserver, Observers, RowOutcome
from fineserve_jax.batch.requests import RowRequests
from fineserve_jax.batch.rows import BadRow, BatchRow, unforeseen
from fineserve_jax.batch.summary import BatchSummary
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.outputs import RequestOutput
from fineserve_jax.errors import DeadEndError, FineServeError, NonFiniteError, RequestError
from fineserve_jax.request import FinishReason, Request
from fineserve_jax.validation import shortened

log = logging.getLogger(__name__)

# Waiting requests per row of a batch: enough for admission to choose from, few enough for a file of any length.
WAITING_PER_ROW = 4
SAVE_TOKENS_EVERY_S = 2.0
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
        self._isolation = Isolation[RowInFlight](max_retries)
        self._outside: deque[RowInFlight] = deque()  # taken out of the engine, to go on later
        self._pending: dict[Request, RowInFlight] = {}
        self._stats = engine.stats()  # after the last step
        self._intake = Intake(delivery, self._answer_rows, self.summary, self.observers)
        self._saved_s = time.monotonic()

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
            elif self._isolation.testing:
                self._isolation.passed()
            elif not self._outside and not self._interruption:
                self._convict()
                return True
        return False

    def _save(self, now: bool = False) -> None:
        """Commits what was answered, and now and then the tokens of what is half done."""
        if now or time.monotonic() - self._saved_s >= SAVE_TOKENS_EVERY_S:
            save_tokens(self.delivery.journal, self._rows_in_engine())
            self._saved_s = time.monotonic()
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
        """Fills the engine's queue: with a group under suspicion by itself, or with all that may be served."""
        if self._isolation.testing:
            return
        if group := self._isolation.next_group():
            for pending in group:
                self._enter(pending)
            return
        limit = WAITING_PER_ROW * self.engine.config.max_batch_size
        while self.engine.scheduler.num_waiting < limit and self._may_enter() and not self._interruption:
            if self._outside:
                self._enter(self._outside.popleft())
                continue
            row = next(rows, None)
            if row is None:
                return
            if isinstance(row, BadRow):
                self._intake.fail(row)
            elif self._intake.admits(row):
                self._admit(row)
            if self.delivery.journal.is_due:
                self._save()

    def _may_enter(self) -> bool:
        limit = self._isolation.row_limit
        return limit is None or len(self._rows_in_engine()) < limit

    def _admit(self, row: BatchRow) -> None:
        try:
            served = self.engine.served(row.options.model)
            request = self._requests.request(row, served.tokenizer, served.max_seq_len)
            self._enter(RowInFlight(row, request, saved_tokens(self.delivery.journal, row.seq)))
        except RequestError as error:
            self._intake.fail(bad_row(row, str(error)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the tokenizer's Rust code is no Exception
            self._intake.fail(bad_row(row, unforeseen(error), "internal_error"))

    def _enter(self, pending: RowInFlight) -> None:
        """Puts a row into the engine, with the tokens it has. Raises `RequestError` if that does not serve it."""
        prepared = self.engine.prepare(*pending.request)
        pending.samples = self.engine.queue(prepared, pending.so_far)
        pending.attempts += 1
        if not pending.saved:
            had = [len(part.token_ids) for part in pending.so_far]
            pending.saved = had + [0] * (len(pending.samples) - len(had))
        for sample in pending.samples:
            self._pending[sample] = pending
        if pending.is_complete:  # it had come to its end, and its answer was not written
            self._finish(pending)

    def _rows_in_engine(self) -> list[RowInFlight]:
        return list(dict.fromkeys(self._pending.values()))

    # -- a step ----------------------------------------------------------------------------------------------------

    def _step(self) -> None:
        start, fault, advanced = time.perf_counter(), "", list[Request]()
        try:
            advanced = self.engine.step()
        except Exception as error:
            fault = f"{type(error).__name__}: {shortened(str(error))}"
            log.warning("the engine has failed", exc_info=error)
        if fault:  # here nothing of the error holds on to the arena any more
            self._recover(fault)
            return
        seconds, before, after = time.perf_counter() - start, self._stats, self.engine.stats()
        self._stats = after
        self.summary.note_step(before, after, seconds)
        self._finish_complete(advanced)
        if not self._isolation.testing:
            self._convict()
        elif all(row.has_advanced for row in self._rows_in_engine()):
            self._isolation.passed()
            self._outside.extend(self._take_out_all())
            self._convict()
        self.observers.step(self.summary, after)

    def _finish_complete(self, requests: Iterable[Request]) -> None:
        """Writes those of the requests' rows all of whose samples are complete."""
        for request in requests:
            pending = self._pending.get(request)  # none if a sample of the same row came before
            if pending is not None and pending.is_complete:
                self._finish(pending)

    # -- faults of the engine --------------------------------------------------------------------------------------

    def _recover(self, fault: str) -> None:
        """Goes on after a step that failed, and finds out which row it failed with."""
        try:
            self.engine.recover()
        except Exception as error:
            raise FineServeError(
                f"the engine has failed: {fault}; it cannot go on: {error}; what is written is sound, so mend the "
                "cause and run the same command with --resume"
            ) from error
        rows, computed = self._rows_in_engine(), set(self.engine.computing)
        running = [row for row in rows if not computed.isdisjoint(row.samples)] or rows
        save_tokens(self.delivery.journal, rows)
        self._take_out_all()
        self.summary.faults += 1
        self.observers.note(f"the engine has failed with {len(running)} rows: {fault}; they are tried again")
        self._isolation.fault(running, fault)
        self._outside.extendleft(row for row in reversed(rows) if row not in running)
        self._stats = self.engine.stats()

    def _take_out_all(self) -> list[RowInFlight]:
        """Takes all rows out of the engine, with the tokens they have."""
        rows = self._rows_in_engine()
        for row in rows:
            samples = row.leave()
            for sample in samples:
                self.engine.abort(sample)
                self.engine.release(sample)
        self._pending.clear()
        return rows

    def _convict(self) -> None:
        """Reports the rows that are to blame for faults."""
        for pending, error in self._isolation.convicted():
            attempts = f"in each of {pending.faults} attempts by itself"
            self._intake.fail(
                bad_row(pending.row, f"the engine fails with this row, {attempts}: {error}", "engine_fault")
            )

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
