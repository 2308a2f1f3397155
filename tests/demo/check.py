"""Holds the log against what its producers and observers wrote down: invariants 1 to 6.

Nothing of the database's own bookkeeping (transaction ids, cursors, hashes) is believed. A batch is known by its
object's key and its byte offset there. Each check returns the first row that offends it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from db.commit import Batch
from db.fetch import FetchedBatch
from tests.demo.ledger import Attempt, Outcome, Reading, Sighting
from tests.demo.storage import content


class PartitionLog(NamedTuple):
    """A partition when all is done: its name, its head, the batches of its runs and those fetched from it."""

    name: str
    start_offset: int
    end_offset: int
    batches: Sequence[FetchedBatch]
    fetched: Sequence[FetchedBatch]


class Origin(NamedTuple):
    """The commit that a batch comes from, and its place there."""

    began: float
    returned: float
    position: int
    batch: Batch


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is known of a run. `objects` are ids by key in the database, `load` returns an object's bytes.

    Without `load` the producers uploaded nothing, and bytes are not compared.
    """

    partitions: Mapping[int, PartitionLog]
    objects: Mapping[str, int]
    attempts: Sequence[Attempt]
    sightings: Sequence[Sighting]
    readings: Sequence[Reading]
    load: Callable[[str], bytes] | None = None
    looks: int = 0
    fetched: int = 0

    @property
    def placed(self) -> int:
        """Batches that have their offsets."""
        return sum(len(log.batches) for log in self.partitions.values())

    @cached_property
    def _loaded(self) -> dict[str, bytes]:
        return {}

    def bytes_of(self, row: FetchedBatch) -> bytes | None:
        """The bytes where a batch should be; None where nothing was uploaded."""
        if self.load is None:
            return None
        if row.object_key not in self._loaded:
            self._loaded[row.object_key] = self.load(row.object_key)
        return self._loaded[row.object_key][row.byte_offset : row.byte_offset + row.byte_length]

    @cached_property
    def by_key(self) -> Mapping[str, Sequence[Attempt]]:
        by_key: defaultdict[str, list[Attempt]] = defaultdict(list)
        for attempt in self.attempts:
            by_key[attempt.key].append(attempt)
        return by_key

    @cached_property
    def origins(self) -> Mapping[tuple[str, int], Origin]:
        """Every committed batch by key and byte offset.

        An object is committed from the first return of an attempt that succeeded, and not before the first of them
        began. One whose outcome no attempt learnt is committed if the database has it.
        """
        origins = {}
        for key, attempts in self.by_key.items():
            told = [a for a in attempts if a.outcome is Outcome.COMMITTED]
            untold = [a for a in attempts if a.outcome is Outcome.UNKNOWN]
            if not told and not (untold and key in self.objects):
                continue
            began = min(a.began for a in (*told, *untold))
            returned = min((a.returned for a in told), default=float("inf"))
            for position, batch in enumerate((told or untold)[0].batches):
                origins[key, batch.byte_offset] = Origin(began, returned, position, batch)
        return origins


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one invariant's check counted, and the first row against it."""

    number: int
    name: str
    counted: str
    violation: str | None


def check(evidence: Evidence) -> list[Finding]:
    """Check all six."""
    commits = len({key for key, _ in evidence.origins})
    rolled_back = sum(a.outcome is Outcome.ROLLED_BACK for a in evidence.attempts)
    refused = sum(a.outcome is Outcome.REFUSED for a in evidence.attempts)
    committed = sum(a.outcome is Outcome.COMMITTED for a in evidence.attempts)
    repeated = max(0, committed - commits)
    subjects: list[tuple[str, str, Iterator[str]]] = [
        (
            "contiguous",
            f"{evidence.placed:,} batches in {len(evidence.partitions)} partitions",
            _not_contiguous(evidence),
        ),
        ("exactly once", f"{len(evidence.origins):,} events, {rolled_back:,} rollbacks", _not_once(evidence)),
        ("real-time order", f"{commits:,} commits in {len(evidence.partitions)} partitions", _out_of_order(evidence)),
        ("immutable", f"{evidence.fetched:,} batches read meanwhile", _changed(evidence)),
        ("never back", f"{evidence.looks:,} looks at the offsets", _gone_back(evidence)),
        ("replay-safe", f"{repeated:,} repeated, {refused:,} conflicts refused", _not_replay_safe(evidence)),
    ]
    return [
        Finding(number=number, name=name, counted=counted, violation=next(violations, None))
        for number, (name, counted, violations) in enumerate(subjects, start=1)
    ]


def _not_contiguous(evidence: Evidence) -> Iterator[str]:
    for log in evidence.partitions.values():
        expected = log.start_offset
        for position, batch in enumerate(log.batches):
            ends = batch.start_offset + batch.n_records
            spans = position == 0 and batch.start_offset <= expected < ends
            if batch.start_offset != expected and not spans:
                yield f"{log.name}: offset {expected:,} is due, found {_row(batch)}"
            expected = ends
        if expected != log.end_offset:
            yield f"{log.name}: the batches end at {expected:,}, the end offset is {log.end_offset:,}"
        for position, (stored, fetched) in enumerate(zip(log.batches, log.fetched, strict=False)):
            if stored != fetched:
                yield f"{log.name}: batch {position} of the log is {_row(stored)}, fetched was {_row(fetched)}"
        if len(log.batches) != len(log.fetched):
            yield f"{log.name}: the log holds {len(log.batches):,} batches, {len(log.fetched):,} were fetched"
    # And in every snapshot that the watcher saw.
    for before, now in _successive(evidence.sightings):
        known = before.end_offset if before else 0
        if now.new_records is not None and now.end_offset != known + now.new_records:
            yield f"{_name(evidence, now)}: {now.new_records:,} records between the end offsets {known:,} and {now}"


def _not_once(evidence: Evidence) -> Iterator[str]:
    placed = set()
    for partition_id, log in evidence.partitions.items():
        for row in log.batches:
            key = row.object_key, row.byte_offset
            origin = evidence.origins.get(key)
            if origin is None:
                known = row.object_key in evidence.by_key
                yield f"{log.name}: {'rolled back' if known else 'never committed'}, yet placed: {_row(row)}"
                continue
            if key in placed:
                yield f"{log.name}: placed twice: {_row(row)}"
            placed.add(key)
            stored = Batch(
                partition_id=partition_id,
                n_records=row.n_records,
                byte_offset=row.byte_offset,
                byte_length=row.byte_length,
                max_timestamp=row.max_timestamp,
            )
            if stored != origin.batch:
                yield f"{log.name}: committed as {origin.batch}, placed as {_row(row)}"
            found = evidence.bytes_of(row)
            if found is not None and found != content(row.object_key, origin.position, row.byte_length):
                yield f"{log.name}: the bytes are not those of batch {origin.position}, but {found[:80]!r}: {_row(row)}"
    for key, origin in evidence.origins.items():
        if key not in placed:
            yield f"{_partition(evidence, origin.batch.partition_id)}: committed and lost: {key[0]} {origin.batch}"


def _out_of_order(evidence: Evidence) -> Iterator[str]:
    for log in evidence.partitions.values():
        known = [
            (evidence.origins[row.object_key, row.byte_offset], row)
            for row in log.batches
            if (row.object_key, row.byte_offset) in evidence.origins
        ]
        for (one, row), (other, later) in pairwise(known):
            if row.object_key == later.object_key and other.position < one.position:
                yield f"{log.name}: batches of one object change places: {_row(row)} and {_row(later)}"
        # For every position, whose commit was the first to return among those that follow.
        first: tuple[Origin, FetchedBatch] | None = None
        against = []
        for origin, row in reversed(known):
            if first is not None and first[0].returned < origin.began:
                ahead = origin.began - first[0].returned
                against.append(
                    f"{log.name}: {_row(row)} stands before {_row(first[1])}, which was committed {ahead:.3f} s "
                    f"before its own commit began"
                )
            if first is None or origin.returned < first[0].returned:
                first = origin, row
        yield from reversed(against)


def _changed(evidence: Evidence) -> Iterator[str]:
    stored = {
        (partition_id, row.start_offset): row
        for partition_id, log in evidence.partitions.items()
        for row in log.batches
    }
    for reading in evidence.readings:
        log = evidence.partitions[reading.partition_id]
        now = stored.get((reading.partition_id, reading.batch.start_offset))
        deleted = reading.batch.start_offset + reading.batch.n_records <= log.start_offset
        if now != reading.batch and not deleted:
            yield f"{log.name}: read as {_row(reading.batch)}, now {_row(now) if now else 'nothing starts there'}"


def _gone_back(evidence: Evidence) -> Iterator[str]:
    last = {}
    for before, now in _successive(evidence.sightings):
        if before and (now.start_offset < before.start_offset or now.end_offset < before.end_offset):
            yield f"{_name(evidence, now)}: {before}, then {now}"
        last[now.reader, now.partition_id] = now
    for seen in last.values():
        log = evidence.partitions[seen.partition_id]
        if log.start_offset < seen.start_offset or log.end_offset < seen.end_offset:
            yield f"{log.name}: {seen}, in the end [{log.start_offset:,}, {log.end_offset:,})"


def _not_replay_safe(evidence: Evidence) -> Iterator[str]:
    for key, attempts in evidence.by_key.items():
        told = [a for a in attempts if a.outcome is Outcome.COMMITTED]
        stored = evidence.objects.get(key)
        for attempt in told:
            if attempt.object_id != stored:
                yield f"{key}: a commit returned id {attempt.object_id}, stored is {stored}"
            if attempt.batches != told[0].batches:
                yield f"{key}: committed a second time with other content, returned id {attempt.object_id}"
        for attempt in attempts:
            if attempt.outcome is not Outcome.REFUSED:
                continue
            if not any(a.batches != attempt.batches for a in attempts):
                yield f"{key}: refused as a conflict, though the content is the same"
    unexplained = evidence.objects.keys() - {
        a.key for a in evidence.attempts if a.outcome in {Outcome.COMMITTED, Outcome.UNKNOWN}
    }
    for key in sorted(unexplained):
        yield f"{key}: stored with id {evidence.objects[key]}, though no commit of it succeeded"


def _successive(sightings: Iterable[Sighting]) -> Iterator[tuple[Sighting | None, Sighting]]:
    """Each sighting with the one before it of the same partition by the same reader."""
    last: dict[tuple[int, int], Sighting] = {}
    for now in sightings:
        yield last.get((now.reader, now.partition_id)), now
        last[now.reader, now.partition_id] = now


def _partition(evidence: Evidence, partition_id: int) -> str:
    log = evidence.partitions.get(partition_id)
    return log.name if log else f"partition id {partition_id}"


def _name(evidence: Evidence, sighting: Sighting) -> str:
    return _partition(evidence, sighting.partition_id)


def _row(batch: FetchedBatch) -> str:
    """A row of the log as a line."""
    return (
        f"[{batch.start_offset:,}, {batch.start_offset + batch.n_records:,}) of {batch.object_key} "
        f"bytes {batch.byte_offset}+{batch.byte_length}"
    )
