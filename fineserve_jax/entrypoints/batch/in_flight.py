"""Rows on their way through the engine, and their tokens so far, as the journal keeps them."""

import json
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

from fineserve_jax.engine.resuming import SampleSoFar
from fineserve_jax.entrypoints.batch.journal import Journal
from fineserve_jax.entrypoints.batch.rows import BatchRow
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.runner.results import TokenLogprobs

NOT_RESUMED = (FinishReason.ABORT, FinishReason.LATE, FinishReason.ERROR)


@dataclass(slots=True, eq=False)
class RowInFlight:
    """A row that was read and is not answered.

    Attributes:
        row: what it is.
        samples: in the engine.
        saved: output tokens of each sample that the journal has.
        attempts: how often it was begun in this run: once, and again after each step that failed as it was computed.
    """

    row: BatchRow
    samples: list[Request]
    saved: list[int]
    attempts: int = 1

    @property
    def is_complete(self) -> bool:
        return all(sample.status is RequestStatus.FINISHED for sample in self.samples)


def _goes_on(sample: Request) -> bool:
    """Whether a sample that is interrupted goes on with its tokens. One whose prompt is scored begins anew: the scores
    come of computing it."""
    return sample.finish_reason not in NOT_RESUMED and sample.scores is None


def save_tokens(journal: Journal, rows: Iterable[RowInFlight]) -> None:
    """Keeps the tokens that rows in the engine have got since the last time."""
    for pending in rows:
        for number, sample in enumerate(pending.samples):
            start, end = pending.saved[number], sample.num_output_tokens
            asked = sample.sampling.gives_logprobs
            if end == start or not _goes_on(sample):
                continue
            first = sample.num_prompt_tokens
            tokens = array("i", sample.token_ids[first + start : first + end]).tobytes()
            logprobs = json.dumps(
                [[e.logprob, list(e.top.items()), list(e.asked.items())] for e in sample.logprobs[start:end]]
            )
            ended = sample.status is RequestStatus.FINISHED
            kv_tokens = json.dumps(sample.kv_tokens) if ended else None
            journal.save_tokens(pending.row.seq, number, start, tokens, logprobs if asked else None, kv_tokens)
            pending.saved[number] = end


def saved_tokens(journal: Journal, seq: int) -> list[SampleSoFar]:
    """What the journal has of a row's samples, one for each up to the last that has any."""
    if not (pieces := journal.saved_tokens(seq)):
        return []
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[TokenLogprobs]] = {}
    kv_tokens: dict[int, dict[str, int]] = {}
    for sample, start, piece, entries, kept in pieces:
        so_far = tokens.setdefault(sample, [])
        if start != len(so_far):
            raise ValueError(f"tokens of sample {sample} of row {seq} are missing in the journal before {start}")
        so_far.extend(array("i", piece))
        if entries is not None:
            known = [TokenLogprobs(value, *map(dict, tables)) for value, *tables in json.loads(entries)]
            logprobs.setdefault(sample, []).extend(known)
        if kept is not None:
            kv_tokens[sample] = json.loads(kept)
    return [
        SampleSoFar(tokens.get(number, []), logprobs.get(number, []), kv_tokens.get(number, {}))
        for number in range(max(tokens, default=-1) + 1)
    ]
