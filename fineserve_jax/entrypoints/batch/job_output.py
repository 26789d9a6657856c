"""An output and its journal: checked against what an earlier run left, mended after a crash, and begun."""

import json
import os
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from fineserve_jax.entrypoints.batch.answers import AnswerFile
from fineserve_jax.entrypoints.batch.delivery import Delivery, OrderedDelivery
from fineserve_jax.entrypoints.batch.identity import Identity, what_changed, what_changed_in_inputs
from fineserve_jax.entrypoints.batch.inputs import InputFile
from fineserve_jax.entrypoints.batch.journal import ADOPTED, Journal, journal_path, remove_journal
from fineserve_jax.entrypoints.batch.row_ids import RowId, id_key
from fineserve_jax.errors import ConfigError

REMEDY = "an output holds the answers of one job; give what it was begun with, or begin another output"


class JobOutput:
    """Where a job's answers go, and what is known of them.

    Opening it checks what can be known before the job; `begin` then changes files.

    Args:
        path, resume, overwrite: see `AnswerFile`.
        ordered: whether answers are to stand in the order of their rows.

    Raises:
        ConfigError: see `AnswerFile`; an output that was changed since the journal was written.

    Attributes:
        notes: for people: what was found of an earlier run.
    """

    def __init__(
        self, path: str | Path, resume: bool = False, overwrite: bool = False, *, ordered: bool = False
    ) -> None:
        self.ordered, self.notes, self._keep_bytes = ordered, list[str](), 0
        self._journal: Journal | None = None
        self.answers = AnswerFile(path, resume, overwrite)
        try:
            if resume:
                self._look_at_earlier(Path(path))
        except BaseException:
            self.close()
            raise

    def _look_at_earlier(self, path: Path) -> None:
        if journal_path(path).exists():
            journal = Journal(journal_path(path))
            if journal.get("durable_bytes") is not None:
                self._journal, self._keep_bytes = journal, _sound_bytes(path, journal)
                return
            journal.close()  # its job had not begun, and it knows nothing of what the output holds
        if self.answers.existed and path.stat().st_size:
            self._keep_bytes = sum(len(line) for line in _whole_lines(path) if _answer_of(path, line) is not None)
            self.notes.append(
                f"{path} has no journal: its rows are known by their ids, and rows that failed are tried again"
            )

    def check(self, identity: Identity, files: Sequence[InputFile]) -> None:
        """Refuses to go on with another job's output.

        Raises:
            ConfigError: options or inputs that are not those of before, saying which.
        """
        before = None if self._journal is None else self._journal.get("identity")
        if before is None:
            return
        if changes := what_changed(before, identity):
            raise ConfigError(f"the output {self.answers.path} was begun otherwise: {'; '.join(changes)}. {REMEDY}")
        if changes := what_changed_in_inputs(before, files, identity):
            raise ConfigError(
                f"the output {self.answers.path} was begun with other rows: {'; '.join(changes)}. {REMEDY}; or remove "
                f"{journal_path(self.answers.path)}, and --resume goes by the ids in the output"
            )
        if before["inputs"] != identity["inputs"]:
            self.notes.append("rows were added to the input since the job was begun; they are answered, too")

    def begin(self, identity: Identity | None = None) -> Delivery:
        """Makes the output and the journal what they have to be; from here on the job writes."""
        path = Path(self.answers.path)
        self.answers.begin(self._keep_bytes)
        if self._journal is None and self.answers.is_regular:
            remove_journal(path)
            self._journal = Journal(journal_path(path))
            self._adopt(path, self._journal)
        journal = self.journal
        lost = journal.forget_behind(self._keep_bytes) if self._keep_bytes < journal.end_of_output() else 0
        if lost:
            self.notes.append(f"{lost} answers did not reach the disk before it stopped; they are computed again")
        if journal.get("created") is None:
            journal.set("created", int(time.time()))
        if identity is not None:
            journal.set("identity", identity)
        delivery = (OrderedDelivery if self.ordered else Delivery)(self.answers, journal)
        delivery.save(now=True)
        return delivery

    @property
    def journal(self) -> Journal:
        """The journal, which of an output that cannot be resumed lasts as long as the job."""
        if self._journal is None:
            self._journal = Journal(None)
        return self._journal

    def _adopt(self, path: Path, journal: Journal) -> None:
        """Enters the ids of what the output holds, see `told_key` for its errors."""
        if not self._keep_bytes:
            return
        for line in _whole_lines(path):
            journal.claim(_answer_of(path, line), ADOPTED)
        journal.set("adopted_bytes", self._keep_bytes)

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()
        self.answers.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _sound_bytes(path: Path, journal: Journal) -> int:
    """How much of the output is as the journal says; what follows was torn off, or written last and not noted.

    Raises:
        ConfigError: the output differs before the place up to which it had reached the disk.
    """
    durable = journal.get("durable_bytes") or 0
    sound = journal.get("adopted_bytes") or 0
    size = os.path.getsize(path) if path.exists() else 0
    if size < sound:
        sound = size
    elif size:
        with path.open("rb") as file:
            file.seek(sound)
            for row in journal.in_output():
                if zlib.crc32(file.read(row.end - sound)) != row.crc:
                    break
                sound = row.end
    if sound < durable:
        what = f"has {size} bytes of {durable}" if size < durable else f"differs from byte {sound} on"
        raise ConfigError(
            f"the output {path} is not what was written to it: it {what}; restore it, or remove {journal_path(path)}, "
            "and --resume goes by the ids in the output"
        )
    return sound


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file. A last one without an end is torn: a run was killed as it wrote it."""
    try:
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))
    except OSError as error:
        raise ConfigError(f"the output {path} cannot be read to resume it: {error.strerror}") from None


def _answer_of(path: Path, line: bytes) -> Any:
    """What an answer, or an error, is known by. Raises `ConfigError` for a line that is neither."""
    try:
        row = json.loads(line)
        if "custom_id" in row:
            error = row["error"]
            if error is None:
                return id_key(row["custom_id"])
            return told_key(error["line"], error["message"], error.get("file"))
        if "error" in row:
            return told_key(row["line"], row["error"], row.get("file"))
        if row["id"] is None:
            raise ValueError("an answer bears its row's id")
        return id_key(row["id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ConfigError(
            f"{path} holds a line that is no answer, so it cannot be resumed: {line[:60].decode(errors='replace')!r}; "
            "name another output, or mend the line"
        ) from None


def told_key(line: int, error: str, file: RowId = None) -> bytes:
    """By what an error that was told before is known; no id of a row is like it."""
    key = id_key(["error", line, error, file])
    assert isinstance(key, bytes)
    return key
