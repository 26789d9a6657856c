"""Sections that others add to the report of a batch job, and their registry.

A package can offer one as an entry point of `fineserve_jax.report_sections`: a subclass of `ReportSection`. Those that
are registered, and those that installed packages offer, are in every report.
"""

import logging
from importlib.metadata import entry_points
from typing import ClassVar

from fineserve_jax.entrypoints.batch.observers import JobObserver
from fineserve_jax.entrypoints.batch.report_html import as_text, table
from fineserve_jax.errors import ConfigError

log = logging.getLogger(__name__)

ENTRY_POINTS = "fineserve_jax.report_sections"


class ReportSection(JobObserver):
    """A section of the report: told of the job as it goes, and asked for its HTML at the end. Subclass it; an object is
    made for each job, without arguments.

    Attributes:
        title: its heading.
        table: a head and rows as an HTML table, escaped; a helper of `body`.
    """

    title: ClassVar[str]
    table = staticmethod(table)

    def body(self) -> str:
        """What stands under the heading, as HTML: escape what you did not write (`html.escape`)."""
        raise NotImplementedError(f"report section {self.title!r} has no body()")


SECTIONS: dict[str, type[ReportSection]] = {}
"""Those that are registered, by their titles."""


def register(section: type[ReportSection]) -> type[ReportSection]:
    """Puts a section into all reports from now on.

    Raises:
        ValueError: it is no section with a title, or another one has the title.
    """
    if not _is_section(section):
        raise ValueError(f"{section!r} is no section with a title; register a subclass of ReportSection")
    if SECTIONS.setdefault(section.title, section) is not section:
        raise ValueError(f"a report section titled {section.title!r} is registered already; choose another title")
    return section


def new_sections() -> list[ReportSection]:
    """One object of each section, for one job, by their titles.

    Raises:
        ConfigError: an installed package offers a section that is none, or that fails when it is loaded or made.
    """
    sections = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            register(entry.load())
        except Exception as error:  # it is somebody else's code
            raise ConfigError(
                f"entry point {entry.name!r} of {ENTRY_POINTS} ({entry.value}) gives no report section: {error}; mend "
                "or uninstall the package, or leave report out"
            ) from error
    for title, section in sorted(SECTIONS.items()):
        try:
            sections.append(section())
        except Exception as error:
            raise ConfigError(
                f"report section {title!r} cannot be made: {error}; mend it, or leave report out"
            ) from error
    return sections


def section_html(section: ReportSection) -> str:
    """A section with its heading. One that has failed says so in its place, and costs no other."""
    heading = f"<h2>{as_text(section.title)}</h2>"
    if section.error is not None:
        return f"{heading}<p>This section failed while the job ran: {as_text(section.error)}</p>"
    try:
        return f"{heading}{section.body()}"
    except Exception as error:
        log.exception("report section %r failed", section.title)
        return f"{heading}<p>This section failed: {as_text(error)}</p>"


def _is_section(section: object) -> bool:
    return (
        isinstance(section, type)
        and issubclass(section, ReportSection)
        and isinstance(getattr(section, "title", None), str)
    )
