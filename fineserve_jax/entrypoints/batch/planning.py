"""In which order rows that have been read are put into the engine: those that begin alike come after each other.

    as they were read           a1 b1 a2 c1 b2 a3
    as they are handed out      a1 a2 a3 b1 b2 c1

So what they have in common is computed once, while its pages are still cached; where rows have nothing in common, their
order stays as it is. BatchLLM (arXiv 2412.03594) does so with a whole job; here as many rows are looked at as are held
in memory, so that a file may have any length.
"""

from collections import deque
from collections.abc import Hashable
from itertools import islice

from fineserve_jax.entrypoints.batch.rows import BatchRow

BEGINNING = 256
"""Characters, about 64 tokens, that rows must have in common at their beginning: less is not worth another order."""
MAX_CHARACTERS = 64 << 20
"""Most characters of all rows that are held, but for one row, which may have more."""


class RowPlan:
    """Rows that have been read, and are not in the engine yet.

    Args:
        num_ahead: most rows held; as many rows that begin alike come after each other at most, so that the others wait
            no longer than that for each group that came before them. With 1, rows come as they are read.
    """

    def __init__(self, num_ahead: int) -> None:
        self._num_ahead = num_ahead
        self._groups: dict[Hashable, deque[tuple[BatchRow, int]]] = {}  # with sizes; the first is handed out
        self._num_rows = self._num_characters = self._num_in_turn = 0

    def __len__(self) -> int:
        return self._num_rows

    @property
    def has_room(self) -> bool:
        """Whether another row is to be read before the next is handed out."""
        return not self._num_rows or (self._num_rows < self._num_ahead and self._num_characters < MAX_CHARACTERS)

    def add(self, row: BatchRow) -> None:
        """Holds a row until its turn."""
        size = _num_characters(row)
        self._groups.setdefault(_beginning(row), deque()).append((row, size))
        self._num_rows += 1
        self._num_characters += size

    def pop(self) -> BatchRow | None:
        """The row whose turn it is; None if there is none."""
        if not self._num_rows:
            return None
        key, group = next(iter(self._groups.items()))
        row, size = group.popleft()
        self._num_in_turn += 1
        if not group or self._num_in_turn >= self._num_ahead:
            del self._groups[key]
            if group:
                self._groups[key] = group  # behind the others
            self._num_in_turn = 0
        self._num_rows -= 1
        self._num_characters -= size
        return row


def _beginning(row: BatchRow) -> Hashable:
    """Equal for rows that can share pages, and begin alike."""
    options = row.options.model, row.options.kv_precision, row.options.min_kv_precision
    if row.messages is None:
        prompt = row.prompt or ()
        return *options, (prompt[:BEGINNING] if isinstance(prompt, str) else tuple(prompt[: BEGINNING // 4]))
    text = ""
    for message in row.messages:
        text += _told(message, BEGINNING)
        if len(text) >= BEGINNING:
            break
    return *options, text[:BEGINNING]


def _told(message: object, most: int) -> str:
    """What a message says, cut somewhere behind so many characters. A wrong one is told as such later, not here."""
    if not isinstance(message, dict):
        return str(message)[:most]
    content = message.get("content")
    parts = content if isinstance(content, list) else [content]
    return f"{message.get('role')}:" + "".join(str(part)[:most] for part in islice(parts, most))


def _num_characters(row: BatchRow) -> int:
    """About how long a row is."""
    if row.messages is None:
        return len(row.prompt or ())
    contents = (message.get("content") for message in row.messages if isinstance(message, dict))
    return sum(len(content if isinstance(content, str) else str(content)) for content in contents)
