"""The journal of a job: an SQLite database beside its output, which knows what was asked and what is done.

    job       what the job is, see `identity`; how much of the output a loss of power cannot take
    ids       which row has which id
    rows      rows whose answer is in the output: where that ends, and its checksum
    held      answers that wait for those of earlier rows, with `--ordered`
    partial   tokens of rows that are half done

Every change belongs to a transaction that is committed up to ten times a second, see `Journal.counted`. A row enters
`rows` after its answer was written, so what a crash leaves behind the last row's end is no answer that the journal
knows, and is cut off. The database survives every end of its process, and with `synchronous=NORMAL` and a write-ahead
log also a loss of power, which can cost its last transactions but not the order of them.
"""

import contextlib
import json
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fineserve_jax.entrypoints.batch.row_ids import IdKey
from fineserve_jax.errors import ConfigError, FineServeError

SUFFIX = ".journal"
VERSION = 2
MIN_INTERVAL_S, MAX_INTERVAL_S, COST_SHARE = 0.1, 2.0, 0.01
"""From one commit to the next: such that commits take no more than that share of the thread's time, in these bounds."""
CACHE_KIB = 16 << 10
CHUNK = 4096
ADOPTED = -1
"""In place of a row: the output held an answer with that id before there was a journal."""

SCHEMA = """
    CREATE TABLE job (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
    CREATE TABLE ids (id PRIMARY KEY, seq INTEGER) WITHOUT ROWID;
    CREATE TABLE rows (seq INTEGER PRIMARY KEY, failed INTEGER, end INTEGER, crc INTEGER);
    CREATE TABLE held (seq INTEGER PRIMARY KEY, failed INTEGER, line BLOB);
    CREATE TABLE partial (
        seq INTEGER, sample INTEGER, start INTEGER, tokens BLOB, logprobs TEXT, kv_tokens TEXT,
        PRIMARY KEY (seq, sample, start)
    ) WITHOUT ROWID;
"""


class WrittenRow(NamedTuple):
    """A row in the output: its place, whether it is an error, and where its line ends, with the line's CRC-32."""

    seq: int
    failed: bool
    end: int
    crc: int


class Journal:
    """An open journal.

    Args:
        path: of the database; None for one that ends with the job, of an output that cannot be resumed.
        clock: seconds, monotonic.

    Raises:
        ConfigError: a file that is no journal, or that another version has written.

    Attributes:
        is_new: nothing had been written to it.
        num_held: answers that it keeps to be written later.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._failure: FineServeError | None = None
        try:
            self._db = sqlite3.connect("" if path is None else path, isolation_level=None)
            self._prepare()
        except sqlite3.Error as error:
            if is_disks_fault(error):
                raise self._cannot_write(error) from None
            raise ConfigError(
                f"the journal {path} cannot be used: {error}; remove it, and --resume goes by the ids in the output"
            ) from None
        self._due_s, self._cost_s = clock() + MIN_INTERVAL_S, 0.0
        self._written: list[WrittenRow] = []
        self._finished: list[tuple[int]] = []
        self.num_held = self._one("SELECT count(*) FROM held")
        self._half_done = {seq for (seq,) in self._db.execute("SELECT DISTINCT seq FROM partial")}

    def _prepare(self) -> None:
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            f"cache_size = -{CACHE_KIB}",
        ):
            self._db.execute(f"PRAGMA {pragma}").fetchall()
        version = self._one("PRAGMA user_version")
        self.is_new = version == 0
        if self.is_new:
            self._db.executescript(f"BEGIN; {SCHEMA}; PRAGMA user_version = {VERSION}; COMMIT")
        elif version != VERSION:
            raise sqlite3.DatabaseError(f"it is of version {version}, this program's are of {VERSION}")
        self._db.execute("BEGIN IMMEDIATE")

    def _one(self, query: str, *values: Any) -> Any:
        row = self._db.execute(query, values).fetchone()
        return None if row is None else row[0]

    # -- what the job is -------------------------------------------------------------------------------------------

    def get(self, name: str) -> Any:
        """A value that was set under a name, None if there is none."""
        value = self._one("SELECT value FROM job WHERE name = ?", name)
        return None if value is None else json.loads(value)

    def set(self, name: str, value: Any) -> None:
        """Keeps a JSON value under a name. Raises `FineServeError` if the database has failed before."""
        self._check()
        self._db.execute("INSERT OR REPLACE INTO job VALUES (?, ?)", (name, json.dumps(value)))

    # -- rows ------------------------------------------------------------------------------------------------------

    def claim(self, key: IdKey, seq: int) -> int | None:
        """Gives an id to a row. None if it is that row's now; else the row that has it, or `ADOPTED`."""
        if self._db.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (key, seq)).rowcount:
            return None
        owner: int = self._one("SELECT seq FROM ids WHERE id = ?", key)
        return None if owner == seq else owner

    def note_written(self, row: WrittenRow) -> None:
        """Its answer is in the output."""
        self._written.append(row)
        if row.seq in self._half_done:
            self._half_done.discard(row.seq)
            self._finished.append((row.seq,))

    def hold(self, seq: int, failed: bool, line: bytes) -> None:
        """Keeps an answer that is not to be written yet."""
        self._db.execute("INSERT OR REPLACE INTO held VALUES (?, ?, ?)", (seq, failed, line))
        self.num_held += 1

    def take_held(self, before: int) -> Iterator[tuple[int, bool, bytes]]:
        """The answers that are kept of rows before a place, in their order; each is forgotten as it is taken."""
        while self.num_held:
            found = self._db.execute(
                "SELECT seq, failed, line FROM held WHERE seq < ? ORDER BY seq LIMIT 64", (before,)
            ).fetchall()
            if not found:
                return
            for seq, failed, line in found:
                yield seq, bool(failed), line
                self._db.execute("DELETE FROM held WHERE seq = ?", (seq,))
                self.num_held -= 1

    def done_earlier(self, read: int = -1) -> Iterator[tuple[int, bool]]:
        """Rows that were answered before this run, and whether they failed, in the order of their places.

        Rows that are done meanwhile must come before the one that was asked for last.
        """
        query = (
            "SELECT seq, failed FROM rows WHERE seq > ? UNION ALL SELECT seq, failed FROM held WHERE seq > ? "
            "ORDER BY seq LIMIT ?"
        )
        while found := self._db.execute(query, (read, read, CHUNK)).fetchall():
            yield from ((seq, bool(failed)) for seq, failed in found)
            read = found[-1][0]

    def in_output(self) -> Iterator[WrittenRow]:
        """The rows in the output, as they lie there."""
        return map(WrittenRow._make, self._db.execute("SELECT seq, failed, end, crc FROM rows ORDER BY end"))

    def end_of_output(self) -> int:
        """Where the last answer that the journal knows ends."""
        return max(self._one("SELECT max(end) FROM rows") or 0, self.get("adopted_bytes") or 0)

    def forget_behind(self, end: int) -> int:
        """Forgets the rows whose answers end behind a place in the output; returns how many they were."""
        return self._db.execute("DELETE FROM rows WHERE end > ?", (end,)).rowcount

    # -- rows that are half done -----------------------------------------------------------------------------------

    def save_tokens(
        self, seq: int, sample: int, start: int, tokens: bytes, logprobs: str | None, kv_tokens: str | None
    ) -> None:
        """Keeps tokens of a sample, from its output token `start` on."""
        self._half_done.add(seq)
        values = (seq, sample, start, tokens, logprobs, kv_tokens)
        self._db.execute("INSERT OR REPLACE INTO partial VALUES (?, ?, ?, ?, ?, ?)", values)

    def saved_tokens(self, seq: int) -> list[tuple[int, int, bytes, str | None, str | None]]:
        """What was kept of a row: sample, start, tokens, logprobs and kv_tokens of each piece, in order."""
        if seq not in self._half_done:
            return []
        query = "SELECT sample, start, tokens, logprobs, kv_tokens FROM partial WHERE seq = ? ORDER BY sample, start"
        return self._db.execute(query, (seq,)).fetchall()

    # -- transactions ----------------------------------------------------------------------------------------------

    @property
    def is_due(self) -> bool:
        """Whether a commit is due."""
        return self._clock() >= self._due_s

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what is done inside to the cost of the next commit, by which is decided when another one is due."""
        start = time.thread_time()
        try:
            yield
        finally:
            self._cost_s += time.thread_time() - start

    def commit(self) -> None:
        """Everything so far survives the end of the process.

        Raises:
            FineServeError: the disk is full, or fails.
        """
        self._check()
        with self.counted(), self.explained():
            self._db.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", self._written)
            self._db.executemany("DELETE FROM partial WHERE seq = ?", self._finished)
            self._db.execute("COMMIT")
            self._db.execute("BEGIN IMMEDIATE")
        self._written.clear()
        self._finished.clear()
        self._due_s = self._clock() + min(max(self._cost_s / COST_SHARE, MIN_INTERVAL_S), MAX_INTERVAL_S)
        self._cost_s = 0.0

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what the database raises when a disk is full, or fails, into a `FineServeError`."""
        try:
            yield
        except sqlite3.Error as error:
            self._failure = self._cannot_write(error)
            raise self._failure from None

    def _check(self) -> None:
        """After a failure there may be no transaction any more, and single changes would be kept without the others."""
        if self._failure is not None:
            raise self._failure

    def _cannot_write(self, error: sqlite3.Error) -> FineServeError:
        return FineServeError(
            f"cannot write to the journal {self.path}: {error}; the output is sound as far as the journal goes, so "
            "make room and run the same command with --resume"
        )

    def close(self) -> None:
        """Closes the database; what was not committed is lost."""
        with contextlib.suppress(sqlite3.Error):  # a full disk was told of when it was written to
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        self._db.close()


def is_disks_fault(error: sqlite3.Error) -> bool:
    """Whether the disk is full, or fails."""
    return getattr(error, "sqlite_errorname", "").startswith(("SQLITE_FULL", "SQLITE_IOERR"))


def journal_path(output: str | Path) -> Path:
    """Where the journal of an output is."""
    return Path(f"{output}{SUFFIX}")


def remove_journal(output: str | Path) -> None:
    """Removes what an earlier job left beside an output."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{journal_path(output)}{suffix}").unlink(missing_ok=True)
