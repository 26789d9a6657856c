"""Adds a section to the report of batch jobs: the rows with the longest answers.

    python examples/add_report_section.py -i examples/prompts.jsonl -o answers.jsonl --report page.html

A section is told of the job as it goes, like any observer, and asked for its part of the page at the end. In a package
of your own, name the class in the entry point group `fineserve_jax.report_sections`, and every `fineserve-jax batch
--report` where the package is installed has the section:

    [project.entry-points."fineserve_jax.report_sections"]
    longest_answers = "my_package.sections:LongestAnswers"
"""

import heapq
import sys
from importlib.metadata import entry_points

from fineserve_jax import ReportSection, RowOutcome, register_report_section

MOST = 5


class LongestAnswers(ReportSection):
    """Keeps a few rows only: a section's memory must not grow with the job."""

    title = "Longest answers"

    def __init__(self) -> None:
        self._longest: list[tuple[int, int, str]] = []

    def row(self, outcome: RowOutcome) -> None:
        if outcome.error is None:
            entry = (sum(outcome.output_tokens), -outcome.seq, str(outcome.id))
            self._longest = heapq.nlargest(MOST, [*self._longest, entry])

    def body(self) -> str:
        rows = [(row_id, f"{1 - seq:,}", f"{tokens:,}") for tokens, seq, row_id in self._longest]
        return self.table(("id", "row", "output tokens"), rows) if rows else "<p>No row was answered.</p>"


def main(arguments: list[str]) -> int:
    register_report_section(LongestAnswers)
    (command,) = entry_points(group="console_scripts", name="fineserve-jax")
    status: int = command.load()(["batch", *arguments])
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
