"""Fresh tables and backlogs for every measurement."""

from typing import Any

import psycopg

# Rows of one committing transaction: what a broker uploads in one object.
_COMMIT_ROWS = 1500

_TABLES = (
    "record_batch_events, tidemark.runs, tidemark.passes, tidemark.log_starts, tidemark.objects, tidemark.topics, "
    "tidemark.topic_partitions, tidemark.deleted_batches, tidemark.dead_objects, tidemark.audit_progress"
)

# The place in the order of commits of the transaction that inserts.
TX = "(select tidemark.tx_base() + pg_current_xact_id()::text::bigint)"

# Prime, so that consecutive events go to partitions far apart, and every partition gets as many.
_STRIDE = 7919


def fresh(conn: psycopg.Connection[Any], partitions: int) -> None:
    """Empty tables (new files) with one topic, whose partition ids are 1 to `partitions`."""
    conn.execute(f"truncate tidemark.{_TABLES} restart identity cascade")
    conn.execute("select tidemark.create_topic('bench', %s)", (partitions,))
    conn.execute("vacuum analyze tidemark.topic_partitions")
    conn.execute("drop schema if exists bench_limit cascade")
    conn.execute("create schema bench_limit")
    conn.execute("create table bench_limit.runs (like tidemark.runs including all)")
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
            f"""
            insert into tidemark.record_batch_events
                (tx, id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
            select {TX}, %s::bigint * 65536 + g %% 65536, g * 1000, 1700000000000 + g,
                   (g * %s::bigint) %% %s::bigint + 1, 1 + g %% 500, 1000
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
        insert into tidemark.objects (tx, batches, key, content_hash, partition_ids, batch_counts)
        select n.tx, sum(n.events), 'object-' || n.object_id, '', array_agg(n.partition_id), array_agg(n.events)
        from (
            select e.tx, e.id >> 16 as object_id, e.partition_id, count(*)::int as events
            from tidemark.record_batch_events e
            group by e.tx, e.id >> 16, e.partition_id
        ) n
        group by n.tx, n.object_id
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
            f"""
            insert into tidemark.record_batch_events
                (tx, id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
            select {TX}, %s::bigint * 65536 + g %% 65536, g * 1000, 1700000000000 + g, floor(random() * %s)::int + %s,
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


def begin_at(conn: psycopg.Connection[Any], offset: int) -> None:
    """As if every partition had `offset` records already."""
    conn.execute(
        "insert into tidemark.runs (partition_id, start_offset, end_offset, end_bytes, max_timestamp, first_tx, "
        "last_tx, batches) select id, 0, %s, 0, 0, 1, 1, 1 from tidemark.topic_partitions",
        (offset,),
    )


def placed(conn: psycopg.Connection[Any]) -> int:
    """How many records have their offsets."""
    row = conn.execute("select coalesce(sum(end_offset - start_offset), 0)::bigint from tidemark.runs").fetchone()
    assert row is not None
    return int(row[0])
