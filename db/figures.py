"""Figures of the whole database for the exporter: read in one snapshot, without a lock, in bounded time.

Bounded in rows as well: topics beyond `topics` are summed up under the name None.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from db.execute import run
from db.translate import domain_errors

# Counting further would keep the server busy for a figure nobody reads to the last digit.
COUNT_LIMIT = 500_000
_ROWS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicFigures:
    """Sums over a topic's partitions: `end_offsets` is every record that ever got an offset, `records` those kept."""

    name: str | None
    topics: int
    partitions: int
    end_offsets: int
    records: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BacklogFigures:
    """What waits in a topic: `lag` is the age in seconds of the oldest event, `overdue` counts partitions."""

    name: str | None
    partitions: int
    events: int
    lag: float
    overdue: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TableFigures:
    """Rows are the statistics' estimates; `bytes` leaves out the indexes."""

    name: str
    bytes: int
    live_rows: int
    dead_rows: int


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexFigures:
    table: str
    name: str
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectionFigures:
    """Sessions of this database in one state."""

    ours: bool
    state: str
    sessions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """All of it at one moment; ages and waits are seconds, 0 where there is none.

    `capped` says that `events` of the backlog were counted up to `COUNT_LIMIT` only.
    """

    topics: tuple[TopicFigures, ...]
    backlog: tuple[BacklogFigures, ...]
    capped: bool
    tables: tuple[TableFigures, ...]
    indexes: tuple[IndexFigures, ...]
    connections: tuple[ConnectionFigures, ...]
    max_connections: int
    held_transactions: int
    held_seconds: float
    lock_waits: int
    lock_wait_seconds: float
    fan_out_age: float
    undispatched_seconds: float
    own_cluster: bool
    audited_at: float | None
    unaudited_records: int


def read_figures(conn: psycopg.Connection[Any], *, topics: int, overdue_seconds: float) -> Figures:
    """Read everything; the connection must be idle. A partition is overdue when an event waits `overdue_seconds`."""
    with domain_errors(), conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        # Statistics of a queue are out of date; a plan for an empty table would scan a full one.
        conn.execute("set local enable_seqscan = off")
        conn.execute("set local jit = off")
        backlog = _rows(conn, "figures_backlog", (topics, COUNT_LIMIT, overdue_seconds))
        # What follows adds up all partitions.
        conn.execute("set local enable_seqscan = on")
        held = _rows(conn, "find_held_cursors", (_ROWS,))
        waits = _rows(conn, "find_lock_waits", (_ROWS,))
        connections = _rows(conn, "figures_connections")
        (fan_out_age, undispatched, own_cluster), *_ = _rows(conn, "read_dispatch")
        (audited_at, unaudited), *_ = _rows(conn, "figures_audit")
        return Figures(
            topics=tuple(
                TopicFigures(
                    name=row[0],
                    topics=row[1],
                    partitions=row[2],
                    end_offsets=int(row[3]),
                    records=int(row[4]),
                    bytes=int(row[5]),
                )
                for row in _rows(conn, "figures_topics", (topics,))
            ),
            backlog=tuple(
                BacklogFigures(name=row[0], partitions=row[1], events=row[2], lag=row[3] or 0.0, overdue=row[4])
                for row in backlog
            ),
            capped=any(row[5] for row in backlog),
            tables=tuple(
                TableFigures(name=row[0], bytes=row[1], live_rows=row[2], dead_rows=row[3])
                for row in _rows(conn, "figures_tables")
            ),
            indexes=tuple(
                IndexFigures(table=row[0], name=row[1], bytes=row[2]) for row in _rows(conn, "figures_indexes")
            ),
            connections=tuple(ConnectionFigures(ours=row[0], state=row[1], sessions=row[2]) for row in connections),
            max_connections=connections[0][3],
            held_transactions=len({row[0] for row in held}),
            held_seconds=max((row[7] or 0.0 for row in held), default=0.0),
            lock_waits=len({row[0] for row in waits}),
            lock_wait_seconds=max((row[2] or 0.0 for row in waits), default=0.0),
            fan_out_age=fan_out_age,
            undispatched_seconds=undispatched or 0.0,
            own_cluster=own_cluster,
            audited_at=audited_at,
            unaudited_records=int(unaudited),
        )


def _rows(conn: psycopg.Connection[Any], name: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    # Planned each time: scrapes are rare, and tables grow between them.
    return run(conn, name, parameters, prepare=False).fetchall()
