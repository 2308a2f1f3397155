"""Figures of the whole database for the exporter: read in one snapshot, without a lock, in bounded time.

Bounded in rows as well: topics beyond `topics` are summed up under the name None.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from db.statements import run
from db.status import HOLDER_KINDS, Dispatch, find_holders, read_dispatch
from db.translate import domain_errors

# Counting further would keep the server busy for a figure nobody reads to the last digit.
COUNT_LIMIT = 500_000
_ROWS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicFigures:
    """Sums over a topic's partitions: `end_offsets` is every record that ever got an offset, `records` those kept.

    Of the backlog: how many partitions have one, its events, the age in seconds of the oldest, and the partitions
    whose oldest is overdue.
    """

    name: str | None
    topics: int
    partitions: int
    end_offsets: int
    records: int
    bytes: int
    waiting: int
    events: int
    lag: float
    overdue: int
    unaudited: int
    audited_at: float | None


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

    `capped` says that the events of backlogs were counted up to `COUNT_LIMIT` only. `held_seconds` is by kind of
    holder.
    """

    topics: tuple[TopicFigures, ...]
    capped: bool
    tables: tuple[TableFigures, ...]
    indexes: tuple[IndexFigures, ...]
    connections: tuple[ConnectionFigures, ...]
    max_connections: int
    open_transactions: int
    open_seconds: float
    held_seconds: Mapping[str, float]
    lock_waits: int
    lock_wait_seconds: float
    dispatch: Dispatch


def read_figures(conn: psycopg.Connection[Any], *, topics: int, overdue_seconds: float) -> Figures:
    """Read everything; the connection must be idle. A partition is overdue when an event waits `overdue_seconds`."""
    with domain_errors(), conn.transaction():
        conn.execute("set transaction isolation level repeatable read, read only")
        # Statistics are out of date; a plan for an empty table would scan a full one.
        conn.execute("set local enable_seqscan = off")
        conn.execute("set local jit = off")
        found = [
            TopicFigures(
                name=row[0],
                topics=row[1],
                partitions=row[2],
                end_offsets=int(row[3]),
                records=int(row[4]),
                bytes=int(row[5]),
                waiting=row[6],
                events=row[7],
                lag=row[8],
                overdue=row[9],
                unaudited=int(row[10]),
                audited_at=row[11],
            )
            for row in _rows(conn, "figures_topics", (topics, COUNT_LIMIT, overdue_seconds))
        ]
        holders = find_holders(conn, _ROWS)
        waits = _rows(conn, "find_lock_waits", (_ROWS,))
        connections = _rows(conn, "figures_connections")
        return Figures(
            topics=tuple(found),
            capped=sum(topic.events for topic in found) >= COUNT_LIMIT,
            tables=tuple(
                TableFigures(name=row[0], bytes=row[1], live_rows=row[2], dead_rows=row[3])
                for row in _rows(conn, "figures_tables")
            ),
            indexes=tuple(
                IndexFigures(table=row[0], name=row[1], bytes=row[2]) for row in _rows(conn, "figures_indexes")
            ),
            connections=tuple(ConnectionFigures(ours=row[0], state=row[1], sessions=row[2]) for row in connections),
            max_connections=connections[0][3],
            open_transactions=sum(holder.has_id for holder in holders),
            open_seconds=max((h.seconds or 0.0 for h in holders if h.has_id), default=0.0),
            held_seconds={
                kind: max((h.seconds or 0.0 for h in holders if h.kind == kind), default=0.0) for kind in HOLDER_KINDS
            },
            lock_waits=len({row[0] for row in waits}),
            lock_wait_seconds=max((row[2] or 0.0 for row in waits), default=0.0),
            dispatch=read_dispatch(conn),
        )


def _rows(conn: psycopg.Connection[Any], name: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    # Planned each time: scrapes are rare, and tables grow between them.
    return run(conn, name, parameters, prepare=False).fetchall()
