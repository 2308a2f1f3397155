"""What producers know to have done, and what readers have seen: in memory, and for processes in a file.

Times are of the monotonic clock, which all processes of a machine share: `began` before anything was sent, `returned`
after the answer was there. An attempt to commit is noted when its outcome is known; in a file it is a line of JSON.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from enum import StrEnum
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

import psycopg

from db.commit import Batch, columns, commit_object
from db.fetch import FetchedBatch


class Outcome(StrEnum):
    """How an attempt ended. `UNKNOWN`: the connection broke, and the commit may or may not have happened."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    REFUSED = "refused"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt to commit one object; `object_id` is what it returned."""

    key: str
    batches: tuple[Batch, ...]
    began: float
    returned: float
    outcome: Outcome
    object_id: int | None = None

    def to_json(self) -> str:
        return json.dumps(
            {
                "key": self.key,
                "outcome": self.outcome,
                "object_id": self.object_id,
                "began": self.began,
                "returned": self.returned,
                "batches": [astuple(batch) for batch in self.batches],
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, line: str | bytes) -> Self:
        values = json.loads(line)
        return cls(
            key=values["key"],
            outcome=Outcome(values["outcome"]),
            object_id=values["object_id"],
            began=values["began"],
            returned=values["returned"],
            batches=tuple(
                Batch(partition_id=b[0], n_records=b[1], byte_offset=b[2], byte_length=b[3], max_timestamp=b[4])
                for b in values["batches"]
            ),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A partition's head when a reader looked.

    `new_records` stood between the end offset that the reader had seen before and this one; None: it did not count.
    """

    partition_id: int
    start_offset: int
    end_offset: int
    new_records: int | None = None
    reader: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """A batch that a fetch returned."""

    partition_id: int
    batch: FetchedBatch


class Notes(Protocol):
    """Where attempts are written down."""

    def write(self, attempt: Attempt) -> None: ...


class Ledger:
    """In memory, filled by producers and readers from any thread."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.sightings: list[Sighting] = []
        self.readings: list[Reading] = []
        # The batches of the objects that are known to be committed, each object's once.
        self.sent: list[Batch] = []
        self._keys: set[str] = set()
        self._lock = Lock()

    def write(self, attempt: Attempt) -> None:
        with self._lock:
            self.attempts.append(attempt)
            if attempt.outcome is Outcome.COMMITTED and attempt.key not in self._keys:
                self._keys.add(attempt.key)
                self.sent += attempt.batches


def note(
    notes: Notes,
    key: str,
    batches: Sequence[Batch],
    began: float,
    outcome: Outcome,
    object_id: int | None = None,
) -> Attempt:
    """Write down an attempt that has just returned."""
    attempt = Attempt(
        key=key,
        batches=tuple(batches),
        began=began,
        returned=time.monotonic(),
        outcome=outcome,
        object_id=object_id,
    )
    notes.write(attempt)
    return attempt


def commit_noted(conn: psycopg.Connection[Any], notes: Notes, key: str, batches: Sequence[Batch]) -> int:
    """Commit an object and write it down; returns its id."""
    began = time.monotonic()
    object_id = commit_object(conn, key, *columns(batches))
    note(notes, key, batches, began, Outcome.COMMITTED, object_id)
    return object_id


class LedgerWriter:
    """A ledger file, for all threads of one producer."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._file = path.open("x", encoding="utf-8")

    def write(self, attempt: Attempt) -> None:
        with self._lock:
            self._file.write(attempt.to_json() + "\n")
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


class LedgerTail:
    """Reads the ledgers in a directory while they grow."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._positions: dict[Path, int] = {}

    def read(self) -> Iterator[Attempt]:
        """Attempts written since the last call; a line that is being written comes next time."""
        for path in sorted(self._directory.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._positions.get(path, 0))
                new = file.read()
            whole = new.rfind(b"\n") + 1
            self._positions[path] = self._positions.get(path, 0) + whole
            yield from map(Attempt.from_json, new[:whole].splitlines())
