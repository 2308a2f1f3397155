"""The hot path as jobs of a crew: `commit_object` and a bare insert of the same rows."""

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import RawCursor

from db import arrays
from db.arrays import Int4Array, Int8Array
from db.commit import commit_object
from tests.benchmarks.cold import logged
from tests.benchmarks.crew import Crew
from tests.benchmarks.measure import Sample
from tests.benchmarks.tables import fresh

PARTITIONS = 16

# The fastest bare form there is: one statement, prepared, binary arrays; only what the table itself demands is checked.
BARE_INSERT = b"""
insert into bench_limit.events (tx, id, partition_id, n_records, byte_offset, byte_length, max_timestamp)
select pg_current_xact_id()::text::bigint, $1::bigint * 65536 + generate_series(0, cardinality($2::int[]) - 1),
       unnest($2::int[]), unnest($3::int[]), unnest($4::bigint[]), unnest($5::int[]), unnest($6::bigint[])
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Production:
    """`commits` objects of `batches` record batches each, by one producer."""

    producer: int
    commits: int
    batches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rows:
    partition_ids: list[int]
    n_records: list[int]
    byte_offsets: list[int]
    byte_lengths: list[int]
    max_timestamps: list[int]


def _rows(batches: int) -> _Rows:
    return _Rows(
        partition_ids=[n % PARTITIONS + 1 for n in range(batches)],
        n_records=[n % 500 + 1 for n in range(batches)],
        byte_offsets=[n * 1000 for n in range(batches)],
        byte_lengths=[1000] * batches,
        max_timestamps=[1_700_000_000_000 + n for n in range(batches)],
    )


def produce(conn: psycopg.Connection[Any], work: Production) -> int:
    """Commit objects through the public function."""
    rows = _rows(work.batches)
    for number in range(work.commits):
        commit_object(
            conn,
            f"bucket/producer-{work.producer}/{number:09}",
            rows.partition_ids,
            rows.n_records,
            rows.byte_offsets,
            rows.byte_lengths,
            rows.max_timestamps,
        )
    return work.commits * work.batches


def insert(conn: psycopg.Connection[Any], work: Production) -> int:
    """Insert the same rows, each object in a transaction of its own."""
    rows = _rows(work.batches)
    for number in range(work.commits):
        cursor = RawCursor(conn)
        arrays.register(cursor.adapters)
        cursor.execute(
            BARE_INSERT,
            (
                number,
                Int4Array(rows.partition_ids),
                Int4Array(rows.n_records),
                Int8Array(rows.byte_offsets),
                Int4Array(rows.byte_lengths),
                Int8Array(rows.max_timestamps),
            ),
        )
    return work.commits * work.batches


def run_hot(conn: psycopg.Connection[Any], crew: Crew, commits: int, batches: int, *, limit: bool) -> Sample:
    """One measurement on fresh tables."""
    fresh(conn, PARTITIONS)
    work = [Production(producer=n, commits=commits, batches=batches) for n in range(crew.size)]
    return logged(conn, crew, insert if limit else produce, work)
