"""Checks the invariants on a live database: takes no locks, reads in bounded stretches, goes on where it stopped.

Each stretch is one read-only repeatable read transaction, so everything in it is seen at one moment: what it finds is
wrong, not in motion. `Violation.invariant` says which rule was broken:

- `start_offset`: a run holds the start offset, or the log is empty.
- `end_offset`: the end offset never goes back.
- `gap`, `overlap`: each run starts where the one before it ends.
- `batches`, `records`, `byte_size`, `max_timestamp`: a run says what its events add up to, each of them read again.
- `position`: a run begins behind the position of the one before it, and a late transaction's does not move it; so no
  event is in two runs.
- `unplaced`: every event below the position is in a run, or pending. Of a transaction that is still running when a run
  is audited, an audit `from_scratch` tells.
- `cursor`, `in_flight`: the cursor's transaction is over; those that ran when it was made are in order.
- `object`: the object of every batch and of every pending event exists.
- `batch_count`: a partition has no more batches of an object than the commit brought: none was placed twice.
- `dead_object`: an object of which a batch was seen is not in dead_objects.
- `object_count`: those deleted and those seen of an object are no more than it brought. Exactly as many, where the
  stretch holds the whole logs of all its partitions: none was lost.

What an audit leaves behind is `audit_progress`, written between the stretches, so a crash costs one of them. Runs that
were audited are not read again; `from_scratch` forgets the progress. A partition whose runs break a rule keeps none:
the next audit finds the same again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from db.arrays import Int4Array
from db.statements import Connection, all_, rows, run
from db.topics import partition_ids

# Partitions that share a stretch: some milliseconds where there is nothing new.
_GROUP = 200
# Enough to see what happened: an audit ends when it has found this many.
_VIOLATIONS = 1_000


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule (see the module), where it is broken first, and what is there."""

    invariant: str
    partition_id: int
    offset: int | None
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditResult:
    """`batches` newly read in `partitions`; `complete` when each was audited up to its end, and one has records."""

    partitions: int
    batches: int
    violations: tuple[Violation, ...]
    complete: bool


@dataclass(kw_only=True, slots=True)
class _Position:
    """Where the audit is in one partition, and where the last one stopped; how many batches it has read."""

    partition_id: int
    offset: int | None
    saved: int | None
    batches: int = 0
    broken: bool = False


def audit(
    conn: Connection,
    *,
    topic: str | None = None,
    from_scratch: bool = False,
    batch_limit: int = 100_000,
    stop: Callable[[], bool] = lambda: False,
) -> AuditResult:
    """Audit all partitions, or those of a topic, from where their last audit stopped; about `batch_limit` batches per
    transaction, for whole runs are read.

    Goes round: begins after the partition that was audited last. `from_scratch` begins with the first, and with the
    first batch of each. Asks `stop` after each transaction; the next call goes on from there. To read everything again
    and again, pass `from_scratch` whenever the result before was complete. The connection must be in autocommit mode.

    Raises UnknownTopicError.
    """
    if batch_limit < 1:
        raise ValueError(f"audit with {batch_limit} batches per transaction: pass at least one")
    ids = None if topic is None else partition_ids(conn, topic)
    if from_scratch:
        run(conn, "forget_audit_progress", (None if ids is None else Int4Array(ids),))
    full = stopped = False
    audited: list[_Position] = []
    violations: list[Violation] = []
    for page in _pages(conn, topic, size=min(_GROUP, batch_limit)):
        group = page
        while group and not full and not stopped:
            group = _stretch(conn, group, batch_limit // len(group), violations)
            full = len(violations) >= _VIOLATIONS
            stopped = not full and stop()
        audited += page
        if stopped:
            # So that the next audit goes on here, also when nothing in this page was new.
            _save(conn, page[-1:], always=True)
        if full or stopped:
            break
    return AuditResult(
        partitions=len(audited),
        batches=sum(position.batches for position in audited),
        violations=tuple(violations),
        complete=not (full or stopped) and any(position.offset for position in audited),
    )


def _pages(conn: Connection, topic: str | None, *, size: int) -> Iterator[list[_Position]]:
    """Partitions in groups, each once: after the one that was audited last, then from the first up to that."""
    row = run(conn, "audit_last_partition").fetchone()
    last: int = row[0] if row else 0
    for after, upto in ((last, 2**31 - 1), (0, last)):
        position = after
        while page := all_(conn, _Position, "audit_partitions", (position, upto, size, topic)):
            position = page[-1].partition_id
            yield page


def _stretch(conn: Connection, group: Sequence[_Position], quota: int, violations: list[Violation]) -> list[_Position]:
    """Audit the next `quota` batches of each partition, in one snapshot; returns those that have more."""
    positions = {position.partition_id: position for position in group}
    more = []
    with conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        run(conn, "transaction_settings")
        for found in rows(conn, "audit_runs", (Int4Array(positions), [p.offset for p in group], quota)):
            position = positions[found.partition_id]
            if found.invariant is None:
                position.offset = found.offset
                position.batches += found.times
                more += [position] * found.has_more
            else:
                position.broken = True
                detail = found.detail if found.times == 1 else f"{found.detail} (the first of {found.times})"
                violations.append(Violation(found.invariant, found.partition_id, found.offset, detail))
        ended = Int4Array(positions.keys() - {position.partition_id for position in more})
        violations += all_(conn, Violation, "audit_heads", (ended,))
    _save(conn, group)
    return more


def _save(conn: Connection, group: Sequence[_Position], *, always: bool = False) -> None:
    """Write down how far the partitions of a stretch are audited; broken ones are to be read again."""
    sound = [p for p in group if not p.broken and p.offset is not None and (always or p.offset != p.saved)]
    broken = [p.partition_id for p in group if p.broken and p.saved is not None]
    if sound:
        run(conn, "save_audit_progress", (Int4Array(p.partition_id for p in sound), [p.offset for p in sound]))
    if broken:
        run(conn, "forget_audit_progress", (Int4Array(broken),))
    for position in group:
        position.saved = None if position.broken else position.offset
