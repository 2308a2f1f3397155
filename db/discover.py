"""Finds the partitions that have something to materialize.

Fan-out looks at the commits since the last one, and costs as much as there are of them. The sweep looks at every
partition, and finds what fan-out handed to a message that was lost.

Crash between finding and `save_seen`: the same commits are found again. Two fan-outs at once: both find them. Either
way a partition is dispatched twice, which costs one empty transaction.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import psycopg

from db.execute import run
from db.translate import domain_errors

# Counting further costs more than it tells: a task can take two such partitions.
_COUNT_LIMIT = 20_000
# Partitions per statement of the sweep: some milliseconds.
_SWEEP_PAGE = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A partition and how many events wait in it (for fan-out: those of the new commits)."""

    partition_id: int
    events: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Committed:
    """What the commits since the last fan-out touched, read in `snapshot`; incomplete at the limit of commits."""

    partitions: tuple[Pending, ...]
    commits: int
    snapshot: str
    complete: bool


def find_committed(conn: psycopg.Connection[Any], *, limit: int = 50_000) -> Committed:
    """Partitions of at most `limit` commits that the last fan-out did not see."""
    with domain_errors():
        state = run(conn, "read_fan_out_state").fetchone()
        assert state is not None  # noqa: S101 - the migration puts the row there
        # Planned for the values at hand: a generic plan would expect a third of all commits to be new.
        row = run(conn, "find_committed", (state[0], state[1], limit), prepare=False).fetchone()
    assert row is not None  # noqa: S101 - an aggregate returns a row
    snapshot, commits, ids, events = row
    return Committed(
        partitions=tuple(Pending(partition_id=i, events=e) for i, e in zip(ids, events, strict=True)),
        commits=commits,
        snapshot=snapshot,
        complete=commits < limit,
    )


def save_seen(conn: psycopg.Connection[Any], snapshot: str) -> None:
    """Remember that the commits visible in `snapshot` are dispatched."""
    with domain_errors():
        run(conn, "save_fan_out_state", (snapshot,))


def sweep(conn: psycopg.Connection[Any]) -> Iterator[Pending]:
    """Every partition with pending events, by id; a page of partitions at a time."""
    after = 0
    while True:
        with domain_errors():
            rows = run(conn, "find_pending", (after, _SWEEP_PAGE, _COUNT_LIMIT)).fetchall()
        if not rows:
            return
        yield from (Pending(partition_id=row[0], events=row[2]) for row in rows if row[2])
        after = rows[-1][1]
