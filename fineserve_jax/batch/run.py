"""From file to file: everything that can be refused is refused before the model is loaded."""

import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fineserve_jax.batch.answers import STDOUT, AnswerFile
from fineserve_jax.batch.job import BatchJob
from fineserve_jax.batch.progress import reporter
from fineserve_jax.batch.prompts import PromptFile
from fineserve_jax.batch.rows import read_rows
from fineserve_jax.batch.summary import BatchSummary
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.load import load_engine
from fineserve_jax.engine.model_settings import model_sources
from fineserve_jax.errors import ConfigError
from fineserve_jax.sampling_params import SamplingParams


def run_batch(
    model: str | Mapping[str, Any],
    source: str | Path,
    target: str | Path,
    config: EngineConfig | None = None,
    sampling: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> BatchSummary:
    """Answers a file of prompts; progress and a summary go to stderr.

    Args:
        model: alias or path; or several models by name, see `LLM`, of which every row then names one.
        source: JSON lines, or "-" for stdin.
        target: where the answers go, or "-" for stdout.
        config: the engine's settings.
        sampling: fields of `SamplingParams` for rows that do not set them.
        resume: go on with an output that an earlier run left: rows with an answer there are passed over.
        overwrite: replace an existing output.

    Raises:
        ConfigError: an input or output that cannot be used, or settings that cannot be honoured.
        RequestError: bad values in `sampling`.
        ModelLoadError: see `load_model`.
        FineServeError: the output could not be written to its end.
    """
    config, sampling = config or EngineConfig(), sampling or {}
    if isinstance(model, Mapping):
        model_sources(model)
    SamplingParams(**sampling)
    with PromptFile(source) as prompts:
        if prompts.is_empty:
            _tell(f"the input {prompts.path} has no rows; a row is a JSON object on a line of its own")
        if prompts.is_same_file(target):
            raise ConfigError(f"{target} is the input, too; name another output")
        with AnswerFile(target, resume, overwrite) as answers:
            engine = load_engine(model, config)
            answers.begin()
            summary = _answer(engine, prompts, answers, sampling)
    _tell(summary.table())
    return summary


def _tell(what: str | Table) -> None:
    """Prints to stderr. That nobody reads it is no reason to fail; rich would end the process."""
    with contextlib.suppress(OSError, SystemExit):
        Console(stderr=True, soft_wrap=isinstance(what, str)).print(what)


def _answer(engine: Engine, prompts: PromptFile, answers: AnswerFile, sampling: Mapping[str, Any]) -> BatchSummary:
    shares_terminal = answers.path == STDOUT and sys.stdout.isatty()
    with reporter(sys.stderr, prompts.num_lines, plain=shares_terminal) as progress:
        job = BatchJob(engine, answers, sampling, on_step=lambda summary, tokens: progress.update(summary.rows, tokens))
        return job.run(read_rows(prompts))
