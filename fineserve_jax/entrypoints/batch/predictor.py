"""An engine as a function of batches: what Ray Data's `map_batches` calls, in each of its actors.

Nothing here needs Ray: a predictor can be called by hand, or by any other system that hands over columns.
"""

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows
from fineserve_jax.entrypoints.batch.delivery import Delivery
from fineserve_jax.entrypoints.batch.job import BatchJob
from fineserve_jax.entrypoints.batch.journal import Journal
from fineserve_jax.entrypoints.batch.observers import JobObserver, RowOutcome
from fineserve_jax.entrypoints.batch.records import Record
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow, parse_row
from fineserve_jax.entrypoints.openai_api.fields import FIELDS
from fineserve_jax.request.sampling_params import SamplingParams

ANSWER = ("text", "finish_reason", "prompt_tokens", "output_tokens", "kv_precision", "error", "answer")
NOT_OF_A_ROW = ("id", "custom_id", "method", "url", "body")
Columns = Mapping[str, Any]


class FineServePredictor:
    """Answers batches of rows; the class to hand to `ray.data.Dataset.map_batches`.

    >>> dataset.map_batches(
    ...     FineServePredictor,
    ...     fn_constructor_kwargs={"model": "smollm2-135m", "sampling": {"max_tokens": 64}},
    ...     batch_size=256,
    ...     compute=ray.data.ActorPoolStrategy(size=2),
    ... )

    A batch has a column `prompt` or `messages`, and may have any other field of a row of `fineserve-jax batch` as a
    column, such as `max_tokens`; what else it has stays as it is. Columns are added: `text`, `finish_reason`,
    `prompt_tokens`, `output_tokens`, `kv_precision`, and `answer`, the whole of it as JSON, with all `n` samples and
    log-probabilities; and `error`, None where there is an answer. A bad row costs the others nothing.

    Rows that are sampled by chance and are to have the same answers however they are batched need a column `seed`.

    Args:
        model: alias or path; or several models by name, of which each row then names one as `model`.
        sampling: fields of `SamplingParams` for rows that do not set them.
        make_engine: makes the engine instead.
        settings: the fields of `EngineConfig`.

    Raises:
        ModelLoadError, ConfigError: see `LLM`.
        RequestError: bad values in `sampling`.
    """

    def __init__(
        self,
        model: str | Mapping[str, Any] = "",
        sampling: Mapping[str, Any] | None = None,
        *,
        make_engine: Callable[[], Engine] | None = None,
        **settings: Any,
    ) -> None:
        self.sampling = dict(sampling or {})
        SamplingParams(**self.sampling)
        config = EngineConfig(**settings)
        self.engine = load_engine(model, config) if make_engine is None else make_engine()

    def __call__(self, batch: Columns) -> dict[str, Any]:
        """The batch with the columns of its answers, as arrays of objects."""
        columns = {name: list(values) for name, values in batch.items()}
        count = len(next(iter(columns.values()), []))
        names = [name for name in columns if name in FIELDS and name not in NOT_OF_A_ROW]
        fields = ({name: _plain(columns[name][i]) for name in names} for i in range(count))
        rows = (parse_row(Record(i + 1, given)) for i, given in enumerate(fields))
        lines = self.answer(rows, AnswerRows(names_model=len(self.engine.models) > 1)).lines
        answers = [_answer_columns(json.loads(lines[i + 1])) for i in range(count)]
        added = {name: _objects([answer[name] for answer in answers]) for name in ANSWER}
        return {**{name: _objects(values) for name, values in columns.items()}, **added}

    def answer(self, rows: Iterable[BatchRow | BadRow], answer_rows: AnswerRows, max_retries: int = 2) -> "Answers":
        """Answers rows; each has a place of its own."""
        answers = Answers()
        job = BatchJob(
            self.engine,
            answers,
            self.sampling,
            max_retries=max_retries,
            answer_rows=answer_rows,
            observers=[answers.outcomes],
        )
        job.run(rows)
        return answers


class JobPredictor(FineServePredictor):
    """Answers the rows of a job.

    A batch has the columns `seq` and `row`, a `BatchRow` in pickle; what comes back has `seq`, `line`, the answer as it
    is to be written, and `outcome`, a `RowOutcome` in pickle.

    Args:
        answer_rows: how the job wants its answers.
        max_retries: see `BatchJob`.
    """

    def __init__(self, *args: Any, answer_rows: AnswerRows, max_retries: int = 2, **options: Any) -> None:
        super().__init__(*args, **options)
        self._answer_rows, self._max_retries = answer_rows, max_retries

    def __call__(self, batch: Columns) -> dict[str, Any]:
        seqs = [int(seq) for seq in batch["seq"]]
        rows = [pickle.loads(row) for row in batch["row"]]
        answers = self.answer(rows, self._answer_rows, self._max_retries)
        outcomes = answers.outcomes.by_seq
        return {
            "seq": np.array(seqs, np.int64),
            "line": _objects([answers.lines[seq] for seq in seqs]),
            "outcome": _objects([pickle.dumps(outcomes[seq]) for seq in seqs]),
        }


class Answers(Delivery):
    """Answers that are kept instead of written.

    Attributes:
        lines: by the places of their rows.
        outcomes: what became of the rows.
    """

    def __init__(self) -> None:
        self.journal, self.lines, self.outcomes = Journal(None), dict[int, bytes](), Outcomes()

    def deliver(self, seq: int, failed: bool, line: bytes) -> None:
        self.lines[seq] = line

    def save(self, now: bool = False) -> None:
        """There is nothing to keep for later: whoever loses these answers asks for them again."""


class Outcomes(JobObserver):
    """What became of rows, by their places."""

    def __init__(self) -> None:
        self.by_seq: dict[int, RowOutcome] = {}

    def row(self, outcome: RowOutcome) -> None:
        self.by_seq[outcome.seq] = outcome


def _answer_columns(answer: Mapping[str, Any]) -> dict[str, Any]:
    """`ANSWER`'s values; of several samples the first."""
    first = answer.get("samples", [answer])[0]
    known = {**answer, **{name: first.get(name) for name in ("text", "finish_reason")}}
    whole = {name: value for name, value in answer.items() if name != "id"}  # which is its place in the batch
    return {**{name: known.get(name) for name in ANSWER}, "answer": None if "error" in answer else json.dumps(whole)}


def _plain(value: Any) -> Any:
    """A cell as JSON would give it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items() if part is not None}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array
