"""From files to a file: everything that can be refused is refused before the model is loaded."""

import contextlib
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.model_settings import model_sources
from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows
from fineserve_jax.entrypoints.batch.answers import STDOUT
from fineserve_jax.entrypoints.batch.delivery import Delivery
from fineserve_jax.entrypoints.batch.identity import job_identity
from fineserve_jax.entrypoints.batch.inputs import Inputs
from fineserve_jax.entrypoints.batch.interruption import Interruption
from fineserve_jax.entrypoints.batch.job import BatchJob
from fineserve_jax.entrypoints.batch.job_output import JobOutput
from fineserve_jax.entrypoints.batch.observers import JobObserver, JobStart
from fineserve_jax.entrypoints.batch.progress import reporter
from fineserve_jax.entrypoints.batch.ray_job import RayJob, RayOptions, import_ray, predictor_arguments
from fineserve_jax.entrypoints.batch.resuming import unanswered
from fineserve_jax.entrypoints.batch.rows import read_rows
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.errors import ConfigError
from fineserve_jax.request.sampling_params import SamplingParams


def run_batch(
    model: str | Path | Mapping[str, Any],
    source: str | Path | Sequence[str | Path],
    target: str | Path,
    config: EngineConfig | None = None,
    sampling: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ordered: bool = False,
    timing: bool = True,
    max_retries: int = 2,
    observers: Iterable[JobObserver] = (),
    make_engine: Callable[[], Engine] | None = None,
    ray: RayOptions | None = None,
) -> BatchSummary:
    """Answers files of prompts; progress and a summary go to stderr.

    Args:
        model: alias or path; or several models by name, see `LLM`, of which every row then names one.
        source: one input or several, see `Inputs`; "-" for stdin.
        target: where the answers go, or "-" for stdout.
        config: the engine's settings.
        sampling: fields of `SamplingParams` for rows that do not set them.
        resume: go on with an output that an earlier run left: rows with an answer there are passed over, and those
            that were half done go on.
        overwrite: replace an existing output.
        ordered: write answers in the order of their rows.
        timing: answers tell how long they took, and when.
        max_retries: how often a row that makes the engine fail by itself is tried again.
        observers: told of all that happens, besides those on stderr.
        make_engine: makes the engine when nothing else can be refused; None: one of `model` and `config`.
        ray: have the rows answered by engines on a Ray cluster; None: by one in this process.

    Raises:
        ConfigError: an input or output that cannot be used, settings that cannot be honoured, or, with `resume`, other
            ones than those that the output was begun with.
        RequestError: bad values in `sampling`.
        ModelLoadError: see `load_model`.
        FineServeError: the output could not be written to its end, or the engine fails whatever it is given.
    """
    config, sampling = config or EngineConfig(), sampling or {}
    if isinstance(model, Mapping):
        model_sources(model)
    SamplingParams(**sampling)
    inputs = Inputs(source)
    if inputs.is_empty:
        _tell(f"the input {', '.join(inputs.names)} has no rows; a row is a JSON object on a line of its own")
    if resume and not inputs.can_be_read_again:
        raise ConfigError(
            "stdin, or a pipe, cannot be resumed: nobody knows whether it holds the same rows again; write it to a file"
        )
    if inputs.is_same_file(target):
        raise ConfigError(f"{target} is the input, too; name another output")
    interruption = Interruption()
    with JobOutput(target, resume, overwrite, ordered=ordered) as output:
        fingerprints = inputs.survey().fingerprints
        identity = job_identity(model, config, sampling, fingerprints, ordered=ordered, timing=timing)
        output.check(identity, inputs.files)
        answer = _answering(model, config, sampling, max_retries, make_engine, ray)
        delivery = output.begin(identity)
        for note in output.notes:
            _tell(note)
        records = inputs if inputs.can_be_read_again else interruption.reading(inputs)
        created = output.journal.get("created") if timing else 0
        names_model = isinstance(model, Mapping) and len(model) > 1
        answer_rows = AnswerRows(inputs.names, names_model=names_model, timing=timing, created=created)
        shares_terminal = output.answers.path == STDOUT and sys.stdout.isatty()
        with reporter(sys.stderr, plain=shares_terminal) as progress, interruption:
            job = answer(delivery, answer_rows, [progress, *observers], interruption)
            job.observers.began(JobStart(inputs.num_rows, tuple(inputs.names), str(target), identity))
            remaining = unanswered(records, delivery, job.summary.note_skipped)
            with _nothing_there_is_garbage():
                summary = job.run(read_rows(remaining, inputs.names, inputs.openai))
    summary.signal = interruption.signal
    _tell(summary.table())
    if summary.interrupted and output.answers.is_regular and inputs.can_be_read_again:
        _tell("run the same command with --resume to go on")
    return summary


Answering = Callable[[Delivery, AnswerRows, Iterable[JobObserver], Interruption], BatchJob | RayJob]


def _answering(
    model: str | Path | Mapping[str, Any],
    config: EngineConfig,
    sampling: Mapping[str, Any],
    max_retries: int,
    make_engine: Callable[[], Engine] | None,
    ray: RayOptions | None,
) -> Answering:
    """What answers the rows, as soon as it is known where to. Loads the model, unless others do."""
    if ray is None:
        engine = load_engine(model, config) if make_engine is None else make_engine()
        return lambda delivery, answer_rows, observers, interruption: BatchJob(
            engine,
            delivery,
            sampling,
            max_retries=max_retries,
            answer_rows=answer_rows,
            observers=observers,
            interruption=interruption,
        )
    predictor = predictor_arguments(model, config, sampling, max_retries, make_engine)
    cluster = import_ray()
    return lambda delivery, answer_rows, observers, interruption: RayJob(
        cluster, ray, predictor, delivery, answer_rows, observers, interruption
    )


@contextlib.contextmanager
def _nothing_there_is_garbage() -> Iterator[None]:
    """What is there now, modules and programs most of it, will be there until the job ends: Python's collector need not
    look through it again and again. Whoever has told it so before is left alone."""
    is_ours = not gc.get_freeze_count()
    if is_ours:
        gc.freeze()
    try:
        yield
    finally:
        if is_ours:
            gc.unfreeze()


def _tell(what: str | Table) -> None:
    """Prints to stderr. That nobody reads it is no reason to fail; rich would end the process."""
    with contextlib.suppress(OSError, SystemExit):
        Console(stderr=True, soft_wrap=isinstance(what, str)).print(what, markup=False)
