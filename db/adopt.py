"""Takes over the log of the seed's system from its tables in the same database, and goes on with the same offsets.

The seed is only read. Its four tables are found in a schema, under the names that its releases gave them, and shown as
views with the same columns (`db/sql/adopt.sql`). Each partition's batches, in the order of their offsets, and behind
them its events that have none yet, are numbered from 1: that number becomes an event's `tx`. So what is adopted stands
before everything that will be committed, whatever the order in which objects were uploaded. Where a log is longer than
the cluster has transactions, a rebase makes room first.

Invariants: nobody sees anything of an adoption before all of it is there and compared with the seed's rows. Topics and
partitions are created in the last transaction, and until then no commit, reader or worker knows the ids. Nothing that
is there is written over: a topic or an object that was not adopted stops everything before a row is written.

The steps, and what a crash leaves behind:

1. One transaction reads the seed behind locks that keep writers out, refuses what cannot be adopted, and reserves ids:
   `adopted_partitions`, with what each partition held. What it read is in temporary tables of the session.
2. Objects, events and runs are copied in transactions of whole runs, in one order. A crash leaves the first of
   them. The next run finds the last event that is there, and goes on behind it: there is no progress to keep.
3. All of it is compared with what was read, in stretches. A crash leaves what was copied.
4. One transaction keeps writers out again, and compares what the seed holds with what it held in the first step,
   perhaps days ago. Only then it creates topics and partitions, and says so in `adopted_partitions`.

So a seed that still runs is found out, though not hindered: what it writes between the steps makes the last one fail.
What was copied can be taken back then, in the reverse order, so that a crash leaves what a shorter adoption leaves.

Lock order: an advisory lock, so that two adoptions do not meet; the seed's tables; partitions, which are its own.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import psycopg
from psycopg.errors import DeadlockDetected, LockNotAvailable

from config.errors import (
    AdoptConflictError,
    AdoptDifferenceError,
    SeedChangedError,
    SeedError,
    TransientDatabaseError,
)
from db.rebase import rebase
from db.statements import Connection, rows, run, values

# Any number, as long as it is always the same.
_LOCK_KEY = 0x61646F7074
# Problems that an error names.
_SHOWN = 5
_DISCARD = "celery -A tasks adopt --discard"

Watch = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adoption:
    """What the seed holds: `batches` with an offset, and `pending` ones without. `copied` and `checked` of both were
    written and compared by this call. `complete`: the topics are there.
    """

    topics: int
    partitions: int
    batches: int
    pending: int
    complete: bool
    copied: int = 0
    checked: int = 0


def adopt(
    conn: Connection,
    *,
    schema: str = "public",
    dry_run: bool = False,
    batch_limit: int = 10_000,
    watch: Watch = lambda _done, _total: None,
) -> Adoption:
    """Adopt the seed's log from the tables in `schema`, or go on with that; about `batch_limit` batches a transaction,
    for whole runs are copied. With `dry_run` everything is looked at, and nothing written.

    Tells `watch` after each transaction how many batches are done, copied and compared, of how many. Whatever it
    raises ends the adoption there. What is adopted already is left as it is. The connection must be in autocommit mode.

    Raises SeedError, SeedChangedError, AdoptConflictError, AdoptDifferenceError, ForeignClusterError; and
    TransientDatabaseError while somebody writes to the seed's tables, or another adoption runs.
    """
    if batch_limit < 1:
        raise ValueError(f"adopt with {batch_limit} batches per transaction: pass at least one")
    with _alone(conn):
        found, longest = _read(conn, schema, keep=not dry_run)
        if dry_run or found.complete:
            return found
        if not values(conn, "adoption_room", (longest,))[0]:
            rebase(conn, force=True)
        total = found.batches + found.pending
        with _transaction(conn, copying=True):
            (first,) = values(conn, "adopted_upto")
        done = max(0, first - 1)
        copied = checked = 0
        for stretch in _stretches(first, total, batch_limit):
            copied += _copy(conn, stretch)
            watch(min(done + copied, total), 2 * total)
        for stretch in _stretches(0, total, batch_limit):
            checked += _check(conn, stretch)
            watch(total + checked, 2 * total)
        if checked != total:
            raise AdoptDifferenceError(f"{checked} of {total} batches were compared. Take them back: {_DISCARD}")
        _publish(conn, schema, found.topics)
    return replace(found, copied=copied, checked=checked, complete=True)


def discard(conn: Connection, *, batch_limit: int = 10_000) -> int:
    """Take back what an adoption copied that is not complete; returns how many batches. About `batch_limit` of them a
    transaction. The connection must be in autocommit mode.

    A crash leaves an adoption that can be taken back, or gone on with. Raises TransientDatabaseError while it runs.
    """
    with _alone(conn):
        discarded = 0
        position: tuple[int, int] | None = (2**31 - 1, 2**63 - 1)
        while position is not None:
            with _transaction(conn, copying=True):
                row = run(conn, "discard_events", (*position, batch_limit)).fetchone()
            position = row[:2] if row else None
            discarded += row[2] if row else 0
        run(conn, "discard_partitions")
    return discarded


@contextmanager
def _alone(conn: Connection) -> Iterator[None]:
    """One adoption at a time, and no view or table of it left in the session."""
    if not values(conn, "lock_adoption", (_LOCK_KEY,))[0]:
        raise TransientDatabaseError("another adoption runs in this database: wait for its end, then try again")
    try:
        run(conn, "discard_temporary")
        yield
    finally:
        # A session that is lost has nothing any more.
        with suppress(psycopg.OperationalError):
            run(conn, "discard_temporary")
            run(conn, "unlock_adoption", (_LOCK_KEY,))


@contextmanager
def _transaction(conn: Connection, *, copying: bool) -> Iterator[None]:
    with conn.transaction():
        # Each statement must see what was written while the one before waited for a lock.
        conn.execute("set transaction isolation level read committed")
        run(conn, "transaction_settings" if copying else "adopt_reading")
        run(conn, "adopt_settings")
        yield


def _read(conn: Connection, schema: str, *, keep: bool) -> tuple[Adoption, int]:
    """The first step; also the number of batches in the longest partition. It is rolled back where nothing is to be
    kept.
    """
    with _transaction(conn, copying=False):
        tables = rows(conn, "find_seed", (schema,))
        _require(tables, schema)
        _lock(conn, tables, schema)
        for table in tables:
            conn.execute(table.view)
        run(conn, "create_seed_rows")
        run(conn, "create_seed_figures")
        _refuse(rows(conn, "find_seed_problems"), schema)
        is_new = run(conn, "reserve_partitions").rowcount > 0
        *counts, complete, longest = values(conn, "adoption_state")
        if not is_new:
            _compare(conn, schema, complete=complete)
        if not complete:
            for statement in ("load_batches", "load_objects", "index_batches", "index_objects", "analyze_batches"):
                run(conn, statement)
            _refuse(rows(conn, "find_row_problems"), schema)
        topics, partitions, batches, pending = counts
        found = Adoption(topics=topics, partitions=partitions, batches=batches, pending=pending, complete=complete)
        if not keep:
            raise psycopg.Rollback
    return found, longest


def _require(tables: Sequence[Any], schema: str) -> None:
    said = [f"there is no table {' or '.join(table.names)}" for table in tables if table.relation is None]
    said += [f"{t.relation} has no column {', '.join(t.missing)}" for t in tables if t.relation and t.missing]
    if said:
        raise SeedError(
            f"schema {schema!r} does not hold the seed's tables: {'; '.join(said)}. Name the one that does (--schema)."
        )


def _lock(conn: Connection, tables: Sequence[Any], schema: str) -> None:
    try:
        for table in tables:
            conn.execute(table.lock)
    except (LockNotAvailable, DeadlockDetected) as error:
        raise TransientDatabaseError(
            f"programs of the seed's system write to its tables in schema {schema!r}: stop them, then try again"
        ) from error


def _refuse(problems: Sequence[Any], schema: str) -> None:
    if not problems:
        return
    said = "; ".join(problem.problem for problem in problems[:_SHOWN])
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    if problems[0].is_conflict:
        raise AdoptConflictError(f"nothing was adopted, for nothing is written over: {said}{more}")
    raise SeedError(f"the seed's tables in schema {schema!r} cannot be adopted as they are: {said}{more}")


def _compare(conn: Connection, schema: str, *, complete: bool) -> None:
    changed = rows(conn, "compare_seed")
    if not changed:
        return
    c = changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    said = f"{c.topic}/{c.partition} held {c.was or 'nothing'}, and now holds {c.now or 'nothing'}{more}"
    if complete:
        raise SeedChangedError(
            f"the seed's tables in schema {schema!r} have changed since their adoption was complete, and the log does "
            f"not have that: {said}. Stop the seed's programs."
        )
    raise SeedChangedError(
        f"the seed's tables in schema {schema!r} have changed since their adoption began: {said}. Stop the seed's "
        f"programs, take back what was copied ({_DISCARD}), then begin again."
    )


def _stretches(first: int, total: int, size: int) -> Iterator[tuple[int, int]]:
    # Runs are found by where they begin in the whole.
    for begin in range(first, total + 1, size):
        yield begin, begin + size


def _copy(conn: Connection, stretch: tuple[int, int]) -> int:
    with _transaction(conn, copying=True):
        objects = run(conn, "copy_objects", stretch).rowcount
        batches, events, wanted = values(conn, "copy_events", stretch)
        if (objects, events) != (wanted, batches):
            # The next run names it, before it writes anything.
            raise AdoptConflictError(
                "somebody has committed, condemned or forgotten an object that was to be adopted: run it again"
            )
    return int(batches)


def _check(conn: Connection, stretch: tuple[int, int]) -> int:
    with _transaction(conn, copying=True):
        same, differences = values(conn, "check_adopted", stretch)
    if differences:
        raise AdoptDifferenceError(
            f"the copy is not what the seed holds: {'; '.join(differences)}. Take it back: {_DISCARD}"
        )
    return int(same)


def _publish(conn: Connection, schema: str, topics: int) -> None:
    with _transaction(conn, copying=False):
        _lock(conn, rows(conn, "find_seed", (schema,)), schema)
        _compare(conn, schema, complete=False)
        run(conn, "transaction_settings")
        if run(conn, "publish_topics").rowcount != topics:
            raise AdoptConflictError("somebody has created a topic that was to be adopted: run it again")
        for statement in ("publish_partitions", "publish_starts", "publish_empty", "complete_adoption"):
            run(conn, statement)
