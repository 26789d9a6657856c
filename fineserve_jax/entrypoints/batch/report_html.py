"""Pieces of HTML that the report of a batch job is put together from."""

import html
from collections.abc import Iterable, Sequence
from typing import Any


def as_text(value: Any) -> str:
    """A value as text that says nothing to a browser but itself."""
    return html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], text: Sequence[int] = ()) -> str:
    """A table, whose cells are escaped. `text`: columns, besides the first, that hold text."""

    def cells(tag: str, row: Sequence[Any]) -> str:
        shown = (f"<{tag}{' class=text' if i in text else ''}>{as_text(cell)}</{tag}>" for i, cell in enumerate(row))
        return f"<tr>{''.join(shown)}</tr>"

    return f'<div class="wide"><table>{cells("th", head)}{"".join(cells("td", row) for row in rows)}</table></div>'
