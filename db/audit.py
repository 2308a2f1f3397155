"""Checks the invariants on a live database: takes no locks, reads in bounded stretches, goes on where it stopped.

Each stretch is one read-only repeatable read transaction, so everything in it is seen at one moment: what it finds is
wrong, not in motion. `Violation.invariant` says which rule was broken:

- `start_offset`: the first batch starts at the start offset, or spans it.
- `end_offset`: the last batch ends at the end offset, which never goes back.
- `gap`, `overlap`, `records`: each batch starts where the one before it ends, and has records.
- `byte_size`: it is the sum over the batches. Checked where one call read the log from its first batch to its end, in
  however many stretches: batches never change, so the sum holds as long as the start offset did not move meanwhile.
- `object`: the object of every batch and of every pending event exists.
- `batch_count`: a partition has no more batches of an object than the commit brought: none was placed twice.
- `live_batches`: no object counts fewer batches than were seen of it, or is in dead_objects. Exactly as many as it has
  batches and pending events, where the stretch holds the whole logs of all its partitions: none was lost.
- `unplaced`: every consumed event that is not trimmed yet has its batch (as many of the newest as a stretch may read).
- `cursor`, `in_flight`: the cursor's transaction is over; those it waits for lie below it.

What an audit leaves behind is `audit_progress`, written between the stretches, so a crash costs one of them. Batches
that were audited are not read again; `from_scratch` forgets the progress. A partition whose batches break a rule keeps
none: the next audit finds the same again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg

from db.arrays import Int4Array
from db.execute import run
from db.topics import partition_ids
from db.translate import domain_errors

# Partitions that share a stretch: some milliseconds where there is nothing new.
_GROUP = 200
# Enough to see what happened. An audit ends when it has found so many.
_VIOLATIONS = 1_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Violation:
    """A broken rule (see the module), where it is broken first, and what is there."""

    invariant: str
    partition_id: int
    offset: int | None
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult:
    """`batches` newly read in `partitions`; `complete` when every partition was audited up to its end."""

    partitions: int
    batches: int
    violations: tuple[Violation, ...]
    complete: bool


@dataclass(kw_only=True, slots=True)
class _Position:
    """Where the audit is in one partition."""

    partition_id: int
    offset: int | None
    saved: int | None
    # Of what this call read, when it began with the first batch: the start offset it saw then, and the sum.
    start_offset: int | None = None
    bytes: int = 0
    broken: bool = False


@dataclass(kw_only=True, slots=True)
class _Findings:
    """What one call gathers."""

    partitions: int = 0
    batches: int = 0
    violations: list[Violation] = field(default_factory=list)

    def add(self, invariant: str, partition_id: int, offset: int | None, detail: str) -> None:
        self.violations.append(Violation(invariant=invariant, partition_id=partition_id, offset=offset, detail=detail))

    def result(self, *, complete: bool) -> AuditResult:
        return AuditResult(
            partitions=self.partitions,
            batches=self.batches,
            violations=tuple(self.violations),
            complete=complete,
        )


def audit(
    conn: psycopg.Connection[Any],
    *,
    topic: str | None = None,
    from_scratch: bool = False,
    batch_limit: int = 100_000,
    stop: Callable[[], bool] = lambda: False,
) -> AuditResult:
    """Audit all partitions, or those of a topic, from where their last audit stopped; at most `batch_limit` batches per
    transaction.

    Goes round: begins after the partition that was audited last. `from_scratch` begins with the first, and with the
    first batch of each. Asks `stop` after each transaction; the next call goes on from there. To read everything again
    and again, pass `from_scratch` whenever the result before was complete. The connection must be in autocommit mode.

    Raises UnknownTopicError.
    """
    if batch_limit < 1:
        raise ValueError(f"audit with {batch_limit} batches per transaction: pass at least one")
    ids = None if topic is None else partition_ids(conn, topic)
    if from_scratch:
        with domain_errors():
            run(conn, "forget_audit_progress", (None if ids is None else Int4Array(ids),))
    findings = _Findings()
    for page in _pages(conn, ids, size=min(_GROUP, batch_limit)):
        group = page
        findings.partitions += len(page)
        first = True
        while group:
            group = _stretch(conn, group, batch_limit // len(group), findings, first=first)
            first = False
            if len(findings.violations) >= _VIOLATIONS:
                return findings.result(complete=False)
            if stop():
                # So that the next audit goes on here, also when nothing in this page was new.
                _save(conn, page[-1:], always=True)
                return findings.result(complete=False)
    return findings.result(complete=True)


def _pages(conn: psycopg.Connection[Any], ids: Sequence[int] | None, *, size: int) -> Iterator[list[_Position]]:
    """Partitions in groups, each once: after the one that was audited last, then from the first up to that."""
    with domain_errors():
        row = run(conn, "audit_last_partition").fetchone()
    last: int = row[0] if row else 0
    if ids is not None:
        turned = [i for i in sorted(ids) if i > last] + [i for i in sorted(ids) if i <= last]
        for start in range(0, len(turned), size):
            with domain_errors():
                rows = run(conn, "audit_partitions_of", (Int4Array(turned[start : start + size]),)).fetchall()
            yield [_Position(partition_id=row[0], offset=row[1], saved=row[1]) for row in rows]
        return
    for after, upto in ((last, None), (0, last)):
        position = after
        while upto is None or position < upto:
            with domain_errors():
                rows = run(conn, "audit_partitions", (position, size)).fetchall()
            if not rows:
                break
            position = rows[-1][0]
            rows = [row for row in rows if upto is None or row[0] <= upto]
            if rows:
                yield [_Position(partition_id=row[0], offset=row[1], saved=row[1]) for row in rows]


def _stretch(
    conn: psycopg.Connection[Any],
    group: Sequence[_Position],
    quota: int,
    findings: _Findings,
    *,
    first: bool,
) -> list[_Position]:
    """Audit the next `quota` batches of each partition, in one snapshot; returns those that have more."""
    positions = {position.partition_id: position for position in group}
    ids = Int4Array(positions)
    with domain_errors(), conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        # One scan per partition along the key, whatever the statistics say.
        conn.execute("set local enable_seqscan = off")
        conn.execute("set local enable_bitmapscan = off")
        conn.execute("set local jit = off")
        if first:
            for partition_id, invariant, offset, detail in run(conn, "audit_heads", (ids,)).fetchall():
                findings.add(invariant, partition_id, offset, detail)
            _check_events(conn, ids, quota, findings)
        offsets = [position.offset for position in group]
        rows = run(conn, "audit_batches", (ids, offsets, quota)).fetchall()
        more, whole = [], []
        for row in rows:
            position = positions[row[0]]
            has_more = row[6] >= quota
            if _check_batches(position, row, findings, has_more=has_more) and not has_more:
                whole.append(row[0])
            if has_more:
                more.append(position)
        starts = (Int4Array(row[0] for row in rows), [row[4] for row in rows])
        for partition_id, invariant, offset, detail, count in run(
            conn, "audit_objects", (*starts, quota, Int4Array(whole))
        ).fetchall():
            findings.add(invariant, partition_id, offset, _counted(detail, count))
            positions[partition_id].broken = True
    _save(conn, group)
    return more


def _check_batches(position: _Position, row: tuple[Any, ...], findings: _Findings, *, has_more: bool) -> bool:
    """Take in a row of audit_batches; returns whether it began with the first batch of the log."""
    (partition_id, start_offset, _, byte_size, _, whole, batches, size, next_offset, *offences) = row
    for invariant, count, batch, what in (
        ("gap", *offences[0:2], "starts after {2}, the end of the one before"),
        ("overlap", *offences[2:4], "starts before {2}, the end of the one before"),
        ("records", *offences[4:6], "has no records"),
    ):
        if count:
            detail = ("batch [{0}, {1}) of object {3} " + what).format(*batch)
            findings.add(invariant, partition_id, batch[0], _counted(detail, count))
            position.broken = True
    findings.batches += batches
    if whole:
        position.start_offset, position.bytes = start_offset, 0
    position.bytes += size
    position.offset = next_offset
    if not has_more and position.start_offset == start_offset and position.bytes != byte_size:
        findings.add(
            "byte_size",
            partition_id,
            start_offset,
            f"byte_size is {byte_size}, the batches from offset {start_offset} to {next_offset} have {position.bytes}",
        )
        position.broken = True
    return bool(whole)


def _check_events(conn: psycopg.Connection[Any], ids: Int4Array, limit: int, findings: _Findings) -> None:
    suspects: dict[int, tuple[list[str], list[int]]] = {}
    orphans: dict[int, tuple[str, int]] = {}
    for partition_id, xid, event_id, object_id, consumed in run(conn, "audit_events", (ids, limit)).fetchall():
        if consumed:
            xids, event_ids = suspects.setdefault(partition_id, ([], []))
            xids.append(xid)
            event_ids.append(event_id)
        else:
            detail, count = orphans.get(
                partition_id,
                (f"pending event ({xid}, {event_id}) refers to object {object_id}, which does not exist", 0),
            )
            orphans[partition_id] = (detail, count + 1)
    for partition_id, (detail, count) in orphans.items():
        findings.add("object", partition_id, None, _counted(detail, count))
    for partition_id, (xids, event_ids) in suspects.items():
        row = run(conn, "audit_unplaced", (partition_id, xids, event_ids)).fetchone()
        if row is not None:
            xid, event_id, object_id, n_records, count = row
            detail = (
                f"event ({xid}, {event_id}) of object {object_id} with {n_records} records lies below the cursor "
                f"and has no batch"
            )
            findings.add("unplaced", partition_id, None, _counted(detail, count))


def _counted(detail: str, count: int) -> str:
    return detail if count == 1 else f"{detail} (the first of {count})"


def _save(conn: psycopg.Connection[Any], group: Sequence[_Position], *, always: bool = False) -> None:
    """Write down how far the partitions of a stretch are audited; broken ones are to be read again."""
    sound = [p for p in group if not p.broken and p.offset is not None and (always or p.offset != p.saved)]
    broken = [p.partition_id for p in group if p.broken and p.saved is not None]
    with domain_errors():
        if sound:
            run(conn, "save_audit_progress", (Int4Array(p.partition_id for p in sound), [p.offset for p in sound]))
        if broken:
            run(conn, "forget_audit_progress", (Int4Array(broken),))
    for position in group:
        position.saved = None if position.broken else position.offset
