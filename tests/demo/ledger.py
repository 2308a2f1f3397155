"""The history of a run: what producers have done and were told, and what readers have seen.

In memory, and for processes in a file, a line of JSON for each record. Times are of the monotonic clock, which all
processes of a machine share: `began` before anything was sent, `returned` after the answer was there. An attempt to
commit is noted when its outcome is known.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from enum import StrEnum
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Protocol, Self

import psycopg

from db.commit import Batch, Verdict, columns, commit_object
from db.fetch import FetchedBatch
from db.receipts import Receipt, receipts


class Outcome(StrEnum):
    """How an attempt ended. `UNKNOWN`: the connection broke, and the commit may or may not have happened.

    `BEGUN`: it is under way. Where nothing else was written of it, its process is gone, and nobody knows either.
    """

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    BEGUN = "begun"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt to commit one object; `object_id` is what it returned.

    `verdicts` are those of `commit_batches`, one for each batch; none where the commit is all or nothing.
    """

    key: str
    batches: tuple[Batch, ...]
    began: float
    returned: float
    outcome: Outcome
    object_id: int | None = None
    verdicts: tuple[Verdict, ...] = ()

    def accepts(self, position: int) -> bool:
        """Whether this batch of it is committed, where the object is."""
        return not self.verdicts or self.verdicts[position] == "accepted"

    def to_json(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps(values | {"batches": [astuple(batch) for batch in self.batches]}, separators=(",", ":"))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        names = [field.name for field in fields(Batch)]
        return cls(
            **values
            | {
                "outcome": Outcome(values["outcome"]),
                "verdicts": tuple(values["verdicts"]),
                "batches": tuple(Batch(**dict(zip(names, row, strict=True))) for row in values["batches"]),
            }
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What `receipts` said of one batch of an object; `position` counts from 0."""

    key: str
    position: int
    began: float
    returned: float
    verdict: str
    base_offset: int | None
    is_pending: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A partition's head when a reader looked.

    `new_records` stood between the end offset that the reader had seen before and this one; None: it did not count.
    """

    partition_id: int
    start_offset: int
    end_offset: int
    began: float
    returned: float
    new_records: int | None = None
    reader: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a fetch from an offset on returned."""

    partition_id: int
    from_offset: int
    batches: tuple[FetchedBatch, ...]
    began: float
    returned: float


class Notes(Protocol):
    """Where attempts and answers are written down."""

    def write(self, record: Attempt | Answer) -> None: ...


class Ledger:
    """In memory, filled by producers and readers from any thread."""

    def __init__(self) -> None:
        self.attempts: list[Attempt] = []
        self.answers: list[Answer] = []
        self.sightings: list[Sighting] = []
        self.readings: list[Reading] = []
        # The batches of the objects that are known to be committed, each object's once.
        self.sent: list[Batch] = []
        # Attempts under way, by key and begin.
        self.begun: dict[tuple[str, float], Attempt] = {}
        self._keys: set[str] = set()
        self._lock = Lock()

    def write(self, record: Attempt | Answer) -> None:
        with self._lock:
            if isinstance(record, Answer):
                self.answers.append(record)
                return
            if record.outcome is Outcome.BEGUN:
                self.begun[record.key, record.began] = record
                return
            self.begun.pop((record.key, record.began), None)
            self.attempts.append(record)
            if record.outcome is Outcome.COMMITTED and record.key not in self._keys:
                self._keys.add(record.key)
                self.sent += (batch for position, batch in enumerate(record.batches) if record.accepts(position))


def note(
    notes: Notes,
    key: str,
    batches: Sequence[Batch],
    began: float,
    outcome: Outcome,
    object_id: int | None = None,
    verdicts: Sequence[Verdict] = (),
) -> Attempt:
    """Write down an attempt that has just returned."""
    attempt = Attempt(
        key=key,
        batches=tuple(batches),
        began=began,
        returned=time.monotonic(),
        outcome=outcome,
        object_id=object_id,
        verdicts=tuple(verdicts),
    )
    notes.write(attempt)
    return attempt


def note_begin(notes: Notes, key: str, batches: Sequence[Batch]) -> float:
    """Write down that an attempt begins, so that it is known if its process dies; returns when."""
    began = time.monotonic()
    notes.write(Attempt(key=key, batches=tuple(batches), began=began, returned=float("inf"), outcome=Outcome.BEGUN))
    return began


def commit_noted(conn: psycopg.Connection[Any], notes: Notes, key: str, batches: Sequence[Batch]) -> int:
    """Commit an object and write it down; returns its id."""
    began = note_begin(notes, key, batches)
    object_id = commit_object(conn, key, *columns(batches))
    note(notes, key, batches, began, Outcome.COMMITTED, object_id)
    return object_id


def ask_noted(conn: psycopg.Connection[Any], notes: Notes, objects: Mapping[int, str]) -> list[Receipt]:
    """Ask what became of objects, keys by id, and write the answers down; returns them."""
    began = time.monotonic()
    found = receipts(conn, objects)
    returned = time.monotonic()
    for receipt in found:
        notes.write(
            Answer(
                key=objects[receipt.object_id],
                position=receipt.batch - 1,
                began=began,
                returned=returned,
                verdict=receipt.verdict,
                base_offset=receipt.base_offset,
                is_pending=receipt.is_pending,
            )
        )
    return found


class LedgerWriter:
    """A ledger file, for all threads of one producer."""

    def __init__(self, path: Path) -> None:
        self._lock = Lock()
        self._file = path.open("x", encoding="utf-8")

    def write(self, record: Attempt | Answer) -> None:
        with self._lock:
            self._file.write(record.to_json() + "\n")
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

    def read(self) -> Iterator[Attempt | Answer]:
        """What was written since the last call; a line that is being written comes next time."""
        for path in sorted(self._directory.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._positions.get(path, 0))
                new = file.read()
            whole = new.rfind(b"\n") + 1
            self._positions[path] = self._positions.get(path, 0) + whole
            for values in map(json.loads, new[:whole].splitlines()):
                yield Attempt.from_values(values) if "batches" in values else Answer(**values)
