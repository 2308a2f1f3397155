"""Fresh tables and backlogs for every measurement."""

from typing import Any

import psycopg

# Rows of one committing transaction: what a broker uploads in one object.
_COMMIT_ROWS = 1500

_TABLES = (
    "record_batch_events, tidemark.record_batches, tidemark.objects, tidemark.topics, tidemark.topic_partitions, "
    "tidemark.dead_objects, tidemark.audit_progress"
)

# Prime, so that consecutive events go to partitions far apart, and every partition gets as many.
_STRIDE = 7919


def fresh(conn: psycopg.Connection[Any], partitions: int) -> None:
    """Empty tables (new files) with one topic, whose partition ids are 1 to `partitions`."""
    conn.execute(f"truncate tidemark.{_TABLES} restart identity cascade")
    conn.execute("select tidemark.create_topic('bench', %s)", (partitions,))
    conn.execute("vacuum analyze tidemark.topic_partitions")
    conn.execute("drop schema if exists bench_limit cascade")
    conn.execute("create schema bench_limit")
    conn.execute("create table bench_limit.batches (like tidemark.record_batches including all)")
    conn.execute("create table bench_limit.events (like tidemark.record_batch_events including all)")
    # Before the load, as it is in life: the pages of the backlog are new in the log when they are read, and setting
    # their hint bits costs no full page images.
    conn.execute("checkpoint")


def load(conn: psycopg.Connection[Any], partitions: int, events_each: int) -> None:
    """A backlog of `events_each` events per partition, committed 1,500 at a time, each over many partitions."""
    total = partitions * events_each
    conn.execute("set synchronous_commit = off")
    for first in range(0, total, _COMMIT_ROWS):
        conn.execute(
            """
            insert into tidemark.record_batch_events
                (object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
            select %s::bigint, g * 1000, 1700000000000 + g, (g * %s::bigint) %% %s::bigint + 1, 1 + g %% 500, 1000
            from generate_series(%s::bigint, %s::bigint) g
            """,
            (first, _STRIDE, partitions, first, min(first + _COMMIT_ROWS, total) - 1),
        )
    conn.execute("reset synchronous_commit")
    conn.execute("analyze tidemark.record_batch_events")


def list_objects(conn: psycopg.Connection[Any]) -> None:
    """The objects of a backlog, which fan-out looks at."""
    conn.execute(
        """
        insert into tidemark.objects (live_batches, key, content_hash, partition_ids, batch_counts)
        select sum(n.events), 'object-' || n.object_id, '', array_agg(n.partition_id), array_agg(n.events)
        from (
            select e.object_id, e.partition_id, count(*)::int as events
            from tidemark.record_batch_events e
            group by e.object_id, e.partition_id
        ) n
        group by n.object_id
        """
    )
    conn.execute("analyze tidemark.objects")


def wal_position(conn: psycopg.Connection[Any]) -> int:
    """Bytes of log written by this cluster so far."""
    row = conn.execute("select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint").fetchone()
    assert row is not None
    return int(row[0])


def load_random(
    conn: psycopg.Connection[Any],
    partitions: range,
    events: int,
    records: tuple[int, int],
    *,
    analyze: bool = True,
) -> None:
    """The seed's data generator: partitions and numbers of records at random, always the same ones."""
    conn.execute("set synchronous_commit = off")
    conn.execute("select setseed(0.42)")
    for first in range(0, events, _COMMIT_ROWS):
        conn.execute(
            """
            insert into tidemark.record_batch_events
                (object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
            select %s::bigint, g * 1000, 1700000000000 + g, floor(random() * %s)::int + %s,
                   %s + floor(random() * (%s - %s + 1))::int, 1000
            from generate_series(%s::bigint, %s::bigint) g
            """,
            (
                first,
                len(partitions),
                partitions.start,
                records[0],
                records[1],
                records[0],
                first,
                min(first + _COMMIT_ROWS, events) - 1,
            ),
        )
    conn.execute("reset synchronous_commit")
    if analyze:
        conn.execute("analyze tidemark.record_batch_events")


def history(conn: psycopg.Connection[Any], partitions: int, batches: int) -> None:
    """As if `batches` batches had been materialized before, of one record each."""
    conn.execute("set synchronous_commit = off")
    conn.execute(
        """
        insert into tidemark.record_batches
            (start_offset, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
        select o, 1, 0, 0, p, 1, 1000 from generate_series(1, %s) p, generate_series(0, %s - 1) o
        """,
        (partitions, batches // partitions),
    )
    conn.execute("update tidemark.topic_partitions set end_offset = %s", (batches // partitions,))
    conn.execute("reset synchronous_commit")
    conn.execute("vacuum analyze tidemark.record_batches")
    conn.execute("checkpoint")


def limit_history(conn: psycopg.Connection[Any]) -> None:
    """The same history for the limit's table, which has to be there already; below whatever offsets it inserts."""
    conn.execute("set synchronous_commit = off")
    conn.execute(
        """
        insert into bench_limit.batches
            (start_offset, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
        select b.start_offset - 1000000000, b.object_id, b.byte_offset, b.max_timestamp, b.partition_id, b.n_records,
               b.byte_length
        from tidemark.record_batches b
        """
    )
    conn.execute("reset synchronous_commit")
    conn.execute("vacuum analyze bench_limit.batches")
    conn.execute("checkpoint")
