"""`fineserve-jax batch`: files of prompts in, a file of answers out."""

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import tyro

from fineserve_jax.entrypoints.batch import BatchCheck, run_batch
from fineserve_jax.entrypoints.batch.ray_job import RayOptions
from fineserve_jax.entrypoints.cli.batch_observers import job_observers
from fineserve_jax.entrypoints.cli.flag_types import Switch
from fineserve_jax.entrypoints.cli.options import ConfigFlag, EngineFlags, ModelFlags, SamplingFlags, flags_of, settle
from fineserve_jax.errors import ConfigError

if TYPE_CHECKING:
    RayFlags: TypeAlias = Mapping[str, Any]
else:
    RayFlags = flags_of(RayOptions)

EXIT_BAD_ROWS = 1
EXIT_BY_SIGNAL = 128  # plus its number, as shells report it

Input = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(aliases=["-i"], metavar="FILE", help_behavior_hint="(repeatable)"),
]
ReportFlag = Annotated[Path | None, tyro.conf.arg(metavar="FILE.html", help_behavior_hint="")]
PortFlag = Annotated[int | None, tyro.conf.arg(metavar="PORT", help_behavior_hint="")]
HostFlag = Annotated[
    str | None, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="(default: 127.0.0.1, the loopback address)")
]
Output = Annotated[str | None, tyro.conf.arg(aliases=["-o"], metavar="FILE", help_behavior_hint="")]


def batch(
    *,
    input: Input,
    output: Output = None,
    resume: Switch = False,
    overwrite: Switch = False,
    ordered: Switch = False,
    no_timing: Switch = False,
    max_retries: int = 2,
    report: ReportFlag = None,
    metrics_port: PortFlag = None,
    metrics_host: HostFlag = None,
    check: Switch = False,
    ray: Switch = False,
    ray_options: RayFlags,
    model: ModelFlags = (),
    config: ConfigFlag = None,
    engine: EngineFlags,
    sampling: SamplingFlags,
) -> None:
    """Answer every row of a file of prompts, each with its KV cache in the precision it asks for.

    A row is a JSON object on a line, {"prompt": "..."} or {"messages": [{"role": "user", "content": "..."}]}.
    It may have "id", "model", "kv_precision" and the sampling options below, as "max_tokens", "temperature" and so
    on, which beat those given here. Requests of OpenAI's batch API are taken as they are, and rows of CSV and Parquet;
    all but Parquet may be compressed. Each answer is written when it is complete, so their order is not that
    of the rows; the id, by default the line number, ties them. A bad row gives a row with "error", and the
    others are answered. A journal beside the output knows what is done, so that --resume goes on after any
    interruption.

    Args:
        input: JSON lines, CSV or Parquet; a pattern such as 'day-*.jsonl'; an address such as s3://bucket/file; or -
            for stdin.
        output: where the answers go, or - for stdout. An existing file is refused without one of the next
            two.
        resume: keep what the output holds, and answer only the rows that have no answer there; those that were half
            done go on.
        overwrite: replace the output.
        ordered: write the answers in the order of the rows.
        no_timing: leave out of the answers when they were made and how long they took, so that equal jobs give equal
            files.
        max_retries: how often a row with which the engine fails is tried again by itself, before it becomes an error.
        report: write a page about the job when it ends: throughput, latencies, lengths, precisions, errors. It opens in
            any browser, without a network.
        metrics_port: tell Prometheus how the job stands, at this port, as long as it runs; 0 takes any that is free.
        metrics_host: the address to listen at for that; anybody who can reach it can read.
        check: answer nothing, and say of each row that cannot be answered why; weights are not loaded.
        ray: have the rows answered by engines on a Ray cluster, here and elsewhere; the answers are written here. Needs
            pip install 'fineserve-jax[ray]'.
        model: alias, .gguf file, Hugging Face directory or converted directory. Several models are given as
            NAME=MODEL or NAME=MODEL:WEIGHTS, e.g. small=smollm2-135m:int8, and rows name theirs as "model".
        config: YAML file with `model` or `models` and defaults for the options below.
    """
    settings = settle(config, model, engine, sampling)
    models = settings.models or settings.model
    if max_retries < 0:
        raise ConfigError(f"max_retries={max_retries} is less than 0; give 0 to try nothing again")
    if check:
        _check(BatchCheck(models, input, settings.config(), settings.sampling))
        return
    if output is None:
        raise ConfigError("there is no output; give a file with -o, - for stdout, or --check to answer nothing")
    if ray_options and not ray:
        raise ConfigError(f"{min(ray_options)} says where on a Ray cluster, and there is no --ray; give it, too")
    cluster = RayOptions(**ray_options) if ray else None
    with job_observers(report, metrics_port, metrics_host) as observers:
        summary = run_batch(
            models,
            input,
            output,
            settings.config(),
            settings.sampling,
            resume=resume,
            overwrite=overwrite,
            ordered=ordered,
            timing=not no_timing,
            max_retries=max_retries,
            observers=observers,
            ray=cluster,
        )
    if summary.interrupted:
        if summary.signal in (None, signal.SIGINT):
            raise KeyboardInterrupt
        sys.exit(EXIT_BY_SIGNAL + summary.signal)


def _check(check: BatchCheck) -> None:
    bad = 0
    for finding in check.findings():
        bad += 1
        print(f"{finding.path}:{finding.line}: {finding.error}")
    print(f"{check.num_rows} rows, {bad} of them bad, {check.num_prompt_tokens} prompt tokens", file=sys.stderr)
    if bad:
        sys.exit(EXIT_BAD_ROWS)
