"""Who else is told of a batch job: a report, and metrics."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from fineserve_jax.entrypoints.batch.metrics import LOOPBACK, MetricsServer
from fineserve_jax.entrypoints.batch.observers import JobObserver
from fineserve_jax.entrypoints.batch.report_sections import new_sections
from fineserve_jax.entrypoints.cli.batch_page import check_report, write_report
from fineserve_jax.entrypoints.cli.batch_record import BatchRecord
from fineserve_jax.errors import ConfigError


@contextlib.contextmanager
def job_observers(
    report: Path | None, metrics_port: int | None, metrics_host: str | None
) -> Iterator[list[JobObserver]]:
    """Observers of a job that runs inside. A report is written behind it, however it ends.

    Args:
        report: file; None: no report.
        metrics_port: where metrics can be had, told on stderr; None: nowhere.
        metrics_host: address to listen at; None: the loopback address.

    Raises:
        ConfigError: a report that cannot be written, or a section of it that cannot be made; a port that cannot be had.
    """
    if metrics_host is not None and metrics_port is None:
        raise ConfigError(f"metrics_host={metrics_host!r} without metrics_port tells nobody anything; give a port")
    with contextlib.ExitStack() as stack:
        observers: list[JobObserver] = []
        if report is not None:
            check_report(report)
            observers += stack.enter_context(_reported(report))
        if metrics_port is not None:
            server = stack.enter_context(MetricsServer(metrics_port, metrics_host or LOOPBACK))
            observers.append(server)
            print(f"metrics at http://{metrics_host or LOOPBACK}:{server.port}/metrics", file=sys.stderr)
        yield observers


@contextlib.contextmanager
def _reported(path: Path) -> Iterator[list[JobObserver]]:
    record, sections = BatchRecord(), new_sections()
    try:
        yield [record, *sections]
    except BaseException:
        if record.has_begun:
            with contextlib.suppress(ConfigError):  # why the job ended is more important
                write_report(record, path, sections)
        raise
    if record.has_begun:
        write_report(record, path, sections)
