"""Real-time order: the seed's statement breaks it with two workers, ours does not. The same interleaving for both.

Worker 1 has taken the early events and is held at the lock of partition 0; worker 2 takes what is left of
partition 1 and wins that partition's lock. No timing is involved: the third connection holds partition 0.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg import Connection
from psycopg.rows import TupleRow

from db.arrays import Int4Array
from db.commit import commit_object
from db.materialize import materialize
from db.statements import run
from tests.integration.conftest import make_topic
from tests.support import Connect, wait_until

SCHEMA = """
create schema seed;
create table seed.topic_partitions (
    topic_id int, partition int, end_offset bigint not null default 0, primary key (topic_id, partition));
create table seed.record_batch_events (
    id bigint generated always as identity primary key, topic_id int, partition int, n_records bigint, s3_key text,
    processed boolean not null default false);
create index on seed.record_batch_events (topic_id, partition, id) where not processed;
create table seed.record_batches (
    id bigint generated always as identity, topic_id int, partition int, start_offset bigint, end_offset bigint,
    s3_key text);
insert into seed.topic_partitions values (1, 0), (1, 1);
"""

# Its six steps, each a query of one statement.
SEED = """
with locked_events as (
    select id, topic_id, partition, n_records, s3_key
    from seed.record_batch_events
    where processed = false
    order by id
    limit %s
    for update skip locked
),
locked_partitions as (
    select tp.topic_id, tp.partition, tp.end_offset
    from seed.topic_partitions tp
    where (tp.topic_id, tp.partition) in (select topic_id, partition from locked_events)
    order by tp.topic_id, tp.partition
    for update of tp
),
offsets as (
    select e.*, tp.end_offset + sum(e.n_records) over (partition by e.topic_id, e.partition order by e.id) as new_end
    from locked_events e join locked_partitions tp using (topic_id, partition)
),
inserted as (
    insert into seed.record_batches (topic_id, partition, start_offset, end_offset, s3_key)
    select topic_id, partition, new_end - n_records, new_end, s3_key from offsets
),
updated as (
    update seed.topic_partitions tp
    set end_offset = o.new_end
    from (select topic_id, partition, max(new_end) as new_end from offsets group by 1, 2) o
    where tp.topic_id = o.topic_id and tp.partition = o.partition
)
update seed.record_batch_events e set processed = true from offsets o where e.id = o.id
"""


def waiting_for_a_lock(conn: Connection[Any], worker: Connection[Any]) -> bool:
    row = conn.execute(
        "select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", (worker.info.backend_pid,)
    ).fetchone()
    return bool(row and row[0])


# Each was acknowledged before the next one began.
COMMITS = [("first", 0), ("second", 1), ("third", 1)]


@pytest.mark.parametrize("held", [True, False])
def test_the_seeds_statement(held: bool, connect: Connect, conn: Connection[TupleRow]) -> None:  # noqa: FBT001
    conn.execute(SCHEMA.encode())
    for key, partition in COMMITS:
        conn.execute(
            "insert into seed.record_batch_events (topic_id, partition, n_records, s3_key) values (1, %s, 10, %s)",
            (partition, key),
        )
    holder, one, two = connect(), connect(), connect()
    with ThreadPoolExecutor(1) as threads:
        if held:
            holder.execute("begin")
            holder.execute("select from seed.topic_partitions where partition = 0 for update")
        first = threads.submit(one.execute, SEED, (2,))
        wait_until(lambda: waiting_for_a_lock(conn, one) if held else first.done())
        two.execute(SEED, (2,))
        holder.rollback()
        first.result(10)
    log = conn.execute(
        "select s3_key, start_offset, end_offset from seed.record_batches where partition = 1 order by start_offset"
    ).fetchall()
    in_order = [("second", 0, 10), ("third", 10, 20)]
    broken = [("third", 0, 10), ("second", 10, 20)]
    assert log == (broken if held else in_order)


def test_ours(connect: Connect, conn: Connection[TupleRow]) -> None:
    ids = make_topic(conn, partitions=2)
    for key, partition in COMMITS:
        commit_object(conn, key, [ids[partition]], [10], [0], [1], [0])
    holder, one, two = connect(), connect(), connect()
    with ThreadPoolExecutor(1) as threads:
        holder.execute("begin")
        run(holder, "lock_partitions", (Int4Array(ids[:1]),))
        first = threads.submit(materialize, one, ids, events_per_partition=1)
        wait_until(lambda: waiting_for_a_lock(conn, one))
        assert materialize(two, ids[1:], events_per_partition=1).events_processed == 1
        holder.rollback()
        assert first.result(10).events_processed == 2
    log = conn.execute(
        "select object_key, start_offset from tidemark.record_batches where partition_id = %s order by start_offset",
        (ids[1],),
    ).fetchall()
    assert log == [("second", 0), ("third", 10)]
