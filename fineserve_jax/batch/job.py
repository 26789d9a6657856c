"""The job itself: keeps the engine supplied with rows and writes each answer as soon as it is complete."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fineserve_jax.batch.answers import AnswerFile
from fineserve_jax.batch.rows import BadRow, Row, RowId, prompt_tokens, row_sampling
from fineserve_jax.batch.summary import BatchSummary
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.outputs import total_kv_tokens
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import Tokenizer
from fineserve_jax.request import FinishReason, Request, RequestStatus
from fineserve_jax.runner.runner import TokenLogprobs

# Waiting requests per row of a batch: enough for admission to choose from, few enough for a file of any length.
WAITING_PER_ROW = 4


@dataclass(slots=True)
class OpenRow:
    """A row whose samples are in the engine."""

    row: Row
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
        self._lines: dict[RowId, int] = {}
        self._open: dict[Request, OpenRow] = {}
        self._stats = engine.stats()  # after the last step

    def run(self, rows: Iterable[Row | BadRow]) -> BatchSummary:
        """Answers all rows. Ctrl-C ends it early: `summary.interrupted`, with all complete rows written."""
        start = time.perf_counter()
        remaining = iter(rows)
        try:
            while self._supply(remaining) or self._open:
                self._step()
        except KeyboardInterrupt:
            self.summary.interrupted = True
            self._finish_complete(list(self._open))
        finally:
            for request in list(self._open):
                self.engine.abort(request)
                self.engine.release(request)
            self.summary.seconds = time.perf_counter() - start
        return self.summary

    # -- rows in -----------------------------------------------------------------------------------------

    def _supply(self, rows: Iterator[Row | BadRow]) -> bool:
        """Fills the engine's queue; False if there is nothing left to fill it with."""
        limit = WAITING_PER_ROW * self.engine.config.max_batch_size
        while self.engine.scheduler.num_waiting < limit:
            row = next(rows, None)
            if row is None:
                return False
            self._take(row)
        return True

    def _take(self, row: Row | BadRow) -> None:
        """Puts a row into the engine, unless it is bad or was answered already."""
        if isinstance(row, BadRow):  # its id, perhaps only its line, stays free for a good row
            self._fail(row.line, row.id, row.error)
            return
        first = self._lines.setdefault(row.id, row.line)
        if first != row.line:
            self._fail(
                row.line,
                row.id,
                f"id {row.id!r} is that of line {first}; give every row an id of its own, or none",
            )
        elif row.id in self.answers.answered:
            self.summary.skipped += 1
        else:
            try:
                self._add(row)
            except RequestError as error:
                self._fail(row.line, row.id, str(error))

    def _add(self, row: Row) -> None:
        tokenizer = self.engine.served(row.model).tokenizer
        tokens, sampling = prompt_tokens(row, tokenizer), row_sampling(row, self.sampling)
        if sampling.seed is None:
            seed = int(np.random.SeedSequence((self.engine.config.seed, row.line)).generate_state(1)[0])
            sampling = sampling.model_copy(update={"seed": seed})
        samples = self.engine.add_samples(
            tokens,
            sampling,
            kv_precision=row.kv_precision,
            min_kv_precision=row.min_kv_precision,
            model=row.model,
            tenant=row.tenant,
            ttft_slo_s=row.ttft_slo_s,
            tpot_slo_s=row.tpot_slo_s,
            drop_when_late=row.drop_when_late,
        )
        self._open |= dict.fromkeys(samples, OpenRow(row, samples))

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
            opened = self._open.get(request)  # none if a sample of the same row came before
            if opened is not None and all(s.status is RequestStatus.FINISHED for s in opened.samples):
                self._finish(opened)

    def _finish(self, opened: OpenRow) -> None:
        first = opened.samples[0]
        answer = answer_row(self.engine, opened.row.id, opened.samples)
        for request in opened.samples:
            del self._open[request]
            self.engine.release(request)
        self.answers.write(answer)
        self.summary.note_row(first.kv_precision, first.num_prompt_tokens, answer["output_tokens"])
        self.summary.late += any(request.finish_reason is FinishReason.LATE for request in opened.samples)

    def _fail(self, line: int, row_id: RowId, error: str) -> None:
        self.summary.errors += 1
        if (line, error) not in self.answers.failed:  # else an earlier run has said so
            self.answers.write({"id": row_id, "line": line, "error": error})


def answer_row(engine: Engine, row_id: RowId, samples: list[Request]) -> dict[str, Any]:
    """The answer to a row whose samples have all finished; see the package's docstring for its fields."""
    first = samples[0]
    written = [_sample(engine, request) for request in samples]
    return {
        "id": row_id,
        **(written[0] if len(written) == 1 else {"samples": written}),
        "prompt_tokens": first.num_prompt_tokens,
        "output_tokens": sum(request.num_output_tokens for request in samples),
        **({"model": first.model} if len(engine.models) > 1 else {}),
        "kv_precision": first.kv_precision,
        "kv_tokens": total_kv_tokens(samples),
    }


def _sample(engine: Engine, request: Request) -> dict[str, Any]:
    sample: dict[str, Any] = {
        "text": engine.texts[request].text,
        "finish_reason": str(request.finish_reason),
        "output_tokens": request.num_output_tokens,
    }
    if request.sampling.logprobs is not None:
        tokenizer = engine.models[request.model].tokenizer
        tokens = zip(request.output_token_ids, request.logprobs, strict=True)
        sample["logprobs"] = [_logprobs(tokenizer, token, entry) for token, entry in tokens]
    return sample


def _logprobs(tokenizer: Tokenizer, token: int, entry: TokenLogprobs) -> dict[str, Any]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": token,
            "text": tokenizer.decode([token], skip_special_tokens=False),
            "logprob": logprob,
        }

    top = [named(other, logprob) for other, logprob in entry.top.items()]
    return named(token, entry.logprob) | ({"top": top} if top else {})
