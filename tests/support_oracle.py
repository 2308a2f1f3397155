"""Checks a log against what its producers and readers wrote down: invariants 1 to 6 of the design.

A batch is known by its object's key and its byte offset in it, so producers give the batches of an object distinct byte
offsets. Nothing of the database's own bookkeeping (xids, cursors, hashes) is believed.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import psycopg


class Placed(NamedTuple):
    """A batch as a reader sees it."""

    partition_id: int
    start_offset: int
    n_records: int
    object_key: str
    byte_offset: int
    byte_length: int
    max_timestamp: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sent:
    """A batch as its producer committed it. `began` and `returned` are of one clock, around the whole transaction."""

    partition_id: int
    n_records: int
    object_key: str
    byte_offset: int
    byte_length: int
    max_timestamp: int
    began: float
    returned: float


class Sighting(NamedTuple):
    """Where a partition's log started and ended when one reader looked."""

    reader: int
    partition_id: int
    start_offset: int
    end_offset: int


@dataclass(kw_only=True, slots=True)
class Ledger:
    """Filled by producers and readers, from any thread."""

    sent: list[Sent] = field(default_factory=list)
    # (object key, id returned), once for every attempt that succeeded.
    attempts: list[tuple[str, int]] = field(default_factory=list)
    sightings: list[Sighting] = field(default_factory=list)
    batches_seen: list[Placed] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """How much was checked for each invariant, and the first offending row of each that is broken."""

    checked: dict[int, int]
    violations: tuple[str, ...]


def read_log(conn: psycopg.Connection[Any]) -> Iterator[Placed]:
    """All batches by partition and offset, some thousand at a time."""
    with conn.transaction(), conn.cursor("tidemark_oracle") as cursor:
        cursor.itersize = 5_000
        cursor.execute(
            "select partition_id, start_offset, n_records, object_key, byte_offset, byte_length, max_timestamp_ms "
            "from tidemark.record_batches order by partition_id, start_offset"
        )
        yield from map(Placed._make, cursor)


def check_log(conn: psycopg.Connection[Any], ledger: Ledger) -> Verdict:
    """Check a log whose backlog is drained. The connection must be in autocommit mode, and nobody may write."""
    check = _Check(conn, ledger)
    for partition_id, batches in groupby(read_log(conn), key=attrgetter("partition_id")):
        check.partition(partition_id, batches)
    check.what_is_missing()
    check.heads_seen(ledger.sightings)
    check.attempts(conn, ledger.attempts)
    return Verdict(
        checked=check.checked,
        violations=tuple(f"invariant {number}: {check.found[number]}" for number in sorted(check.found)),
    )


class _Check:
    """What is counted and found while the log is read once, in its order."""

    def __init__(self, conn: psycopg.Connection[Any], ledger: Ledger) -> None:
        self.checked = dict.fromkeys(range(1, 7), 0)
        # The first message for each invariant is the one that is kept.
        self.found: dict[int, str] = {}
        self._heads: dict[int, tuple[int, int]] = {
            row[0]: (row[1], row[2])
            for row in conn.execute(
                "select partition_id, start_offset, end_offset from tidemark.named_partitions"
            ).fetchall()
        }
        self._with_batches: set[int] = set()
        self._sent = {(s.object_key, s.byte_offset): s for s in ledger.sent}
        if len(self._sent) != len(ledger.sent):
            raise ValueError("batches in the ledger share object key and byte offset")
        self._placed: set[tuple[str, int]] = set()
        self._seen = {(b.partition_id, b.start_offset): b for b in ledger.batches_seen}

    def _wrong(self, invariant: int, message: str) -> None:
        self.found.setdefault(invariant, message)

    def partition(self, partition_id: int, batches: Iterable[Placed]) -> None:
        self._with_batches.add(partition_id)
        expected, end_offset = self._heads[partition_id]
        offsets: list[tuple[float, float, Placed]] = []
        first = True
        for batch in batches:
            self.checked[1] += 1
            spans = first and batch.start_offset <= expected < batch.start_offset + batch.n_records
            if batch.start_offset != expected and not spans:
                self._wrong(1, f"expected offset {expected}, found {batch}")
            expected = batch.start_offset + batch.n_records
            first = False
            if (origin := self._origin(batch)) is not None:
                offsets.append((origin.began, origin.returned, batch))
            self._against_readers(batch)
        if expected != end_offset:
            self._wrong(1, f"partition {partition_id} ends at {end_offset}, its batches at {expected}")
        self.checked[3] += len(offsets)
        if broken := _out_of_order(offsets):
            self._wrong(3, broken)

    def _origin(self, batch: Placed) -> Sent | None:
        self.checked[2] += 1
        key = (batch.object_key, batch.byte_offset)
        if key in self._placed:
            self._wrong(2, f"placed twice: {batch}")
        self._placed.add(key)
        origin = self._sent.get(key)
        if origin is None:
            self._wrong(2, f"never committed: {batch}")
        elif _content(origin) != _content(batch):
            self._wrong(2, f"committed as {origin}, placed as {batch}")
        return origin

    def _against_readers(self, batch: Placed) -> None:
        earlier = self._seen.pop((batch.partition_id, batch.start_offset), None)
        if earlier is not None:
            self.checked[4] += 1
            if earlier != batch:
                self._wrong(4, f"a reader saw {earlier}, the log holds {batch}")

    def what_is_missing(self) -> None:
        """After all partitions: what the ledger has and the log has not."""
        for partition_id in self._heads.keys() - self._with_batches:
            start_offset, end_offset = self._heads[partition_id]
            if start_offset != end_offset:
                self._wrong(1, f"partition {partition_id} has no batches between {start_offset} and {end_offset}")
        if lost := self._sent.keys() - self._placed:
            self._wrong(2, f"{len(lost)} batches lost, the first is {self._sent[min(lost)]}")
        for batch in self._seen.values():
            # Below the start offset it was deleted, which is no change.
            if batch.start_offset + batch.n_records > self._heads[batch.partition_id][0]:
                self._wrong(4, f"a reader saw {batch}, which is gone")

    def heads_seen(self, sightings: Iterable[Sighting]) -> None:
        last: dict[tuple[int, int], Sighting] = {}
        for now in sightings:
            self.checked[5] += 1
            before = last.get((now.reader, now.partition_id))
            if before and (now.start_offset < before.start_offset or now.end_offset < before.end_offset):
                self._wrong(5, f"{before}, then {now}")
            last[now.reader, now.partition_id] = now

    def attempts(self, conn: psycopg.Connection[Any], attempts: Iterable[tuple[str, int]]) -> None:
        stored: dict[str, int] = dict(conn.execute("select key, id from tidemark.objects").fetchall())
        returned: defaultdict[str, set[int]] = defaultdict(set)
        for key, object_id in attempts:
            self.checked[6] += 1
            returned[key].add(object_id)
        for key, ids in returned.items():
            if ids != {stored.get(key)}:
                self._wrong(6, f"object {key!r}: attempts returned {sorted(ids)}, stored is {stored.get(key)}")
        if phantom := stored.keys() - returned.keys():
            self._wrong(6, f"object {min(phantom)!r} is stored, and no attempt succeeded")


def _content(batch: Sent | Placed) -> tuple[int, int, int, int]:
    return batch.partition_id, batch.n_records, batch.byte_length, batch.max_timestamp


def _out_of_order(offsets: list[tuple[float, float, Placed]]) -> str | None:
    """The first batch that stands before one whose commit had returned when its own began."""
    by_return = sorted(offsets, key=itemgetter(1))
    returned = 0
    highest: Placed | None = None
    for began, _, batch in sorted(offsets, key=itemgetter(0)):
        while returned < len(by_return) and by_return[returned][1] < began:
            candidate = by_return[returned][2]
            if highest is None or candidate.start_offset > highest.start_offset:
                highest = candidate
            returned += 1
        if highest is not None and batch.start_offset < highest.start_offset:
            return f"{highest} was committed before {batch} began"
    return None
