"""Plans of the hot statements, with the statistics a queue has in its life and with plans made for other values.

The bounds are on rows and on pages, by EXPLAIN ANALYZE where a statement stands in a file, by the server's counters
where it stands inside a function: work goes with the result, not with the history.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow

from config.embedded.postgres import PostgresServer
from db.arrays import Int4Array
from db.commit import commit_object
from db.execute import run
from db.materialize import materialize
from db.statements import statement
from db.topics import create_topic, partition_ids
from tests.support import Connect

STATISTICS = ["empty", "typical", "skewed"]
MODES = ["force_custom_plan", "force_generic_plan"]
GROWING = {"record_batch_events", "record_batches", "objects"}
PARTITIONS = 50
CONSUMED = 40_000
PENDING = 20_000


class Data(NamedTuple):
    url: str
    ids: list[int]
    statistics: str


def fill(conn: Connection[Any], ids: list[int], weights: Sequence[int], key: str) -> None:
    """One object with as many batches for each partition as its weight says."""
    partitions = [i for i, weight in zip(ids, weights, strict=True) for _ in range(weight)]
    count = len(partitions)
    commit_object(conn, key, partitions, [1] * count, range(count), [1] * count, [0] * count)


@pytest.fixture(scope="module", params=STATISTICS)
def data(request: pytest.FixtureRequest, postgres_server: PostgresServer, template_database: str) -> Iterator[Data]:
    """A history of consumed events and a backlog. `empty`: what was analyzed (if anything) was an empty database.

    `skewed`: one partition has 99 of 100 events.
    """
    statistics: str = request.param
    name = f"plans_{statistics}"
    identifier, template = sql.Identifier(name), sql.Identifier(template_database)
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template {}").format(identifier, template))
        url = postgres_server.url(name)
        with psycopg.connect(url, autocommit=True) as conn:
            # Statistics are as old as the case says.
            for table in (*GROWING, "topic_partitions"):
                conn.execute(f"alter table tidemark.{table} set (autovacuum_enabled = off)".encode())
            create_topic(conn, "orders", PARTITIONS)
            ids = partition_ids(conn, "orders")
            if statistics == "skewed":
                share = [99, *[1] * (PARTITIONS - 1)]
                weights = [weight * CONSUMED // sum(share) for weight in share]
            else:
                weights = [CONSUMED // PARTITIONS] * PARTITIONS
            if statistics == "empty":
                conn.execute("analyze")
            fill(conn, ids, weights, "consumed")
            materialize(conn, ids, events_per_partition=CONSUMED)
            for number in range(500):
                fill(conn, ids[:1], [1], f"old {number}")
            materialize(conn, ids, events_per_partition=CONSUMED)
            if statistics != "empty":
                conn.execute("analyze")
            fill(conn, ids, [weight * PENDING // CONSUMED for weight in weights], "pending")
        yield Data(url, ids, statistics)
        admin.execute(sql.SQL("drop database {} with (force)").format(identifier))


@pytest.fixture
def worker(data: Data) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(data.url) as conn:
        yield conn
        conn.rollback()


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


class Explained:
    """A statement's plan as it ran."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.nodes = list(nodes(plan))

    @property
    def sequential(self) -> set[str]:
        return {n["Relation Name"] for n in self.nodes if n["Node Type"].endswith("Seq Scan")}

    @property
    def indexes(self) -> set[str]:
        return {n["Index Name"] for n in self.nodes if "Index Name" in n}

    @property
    def kinds(self) -> set[str]:
        return {n["Node Type"] for n in self.nodes}

    def rows_read(self, table: str) -> int:
        return sum(
            n["Actual Loops"]
            * (n["Actual Rows"] + n.get("Rows Removed by Filter", 0) + n.get("Rows Removed by Index Recheck", 0))
            for n in self.nodes
            if n.get("Relation Name") == table and "Scan" in n["Node Type"]
        )


def explain(conn: Connection[Any], name: str, types: str, values: Sequence[object], mode: str) -> Explained:
    """As the program runs it, but for the statement of settings, which is the caller's."""
    conn.execute(f"set local plan_cache_mode = {mode}".encode())
    conn.execute(f"prepare {name} ({types}) as ".encode() + statement(name))
    literals = sql.SQL(", ").join(map(sql.Literal, values))
    query = sql.SQL("explain (analyze, buffers, format json) execute {} ({})").format(sql.Identifier(name), literals)
    row = conn.execute(query).fetchone()
    assert row
    return Explained(row[0][0]["Plan"])


def settings(conn: Connection[Any]) -> None:
    conn.execute(statement("transaction_settings"))


def counters(conn: Connection[Any]) -> dict[str, tuple[int, int]]:
    """By table: sequential scans, and rows read by this transaction so far."""
    rows = conn.execute(
        "select relname, seq_scan, seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables "
        "where schemaname = 'tidemark'"
    ).fetchall()
    return {row[0]: (row[1], row[2]) for row in rows}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, PARTITIONS])
def test_lock(count: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    settings(worker)
    plan = explain(worker, "lock_partitions", "int[]", (data.ids[:count],), mode)
    assert plan.sequential == set()
    assert plan.indexes == {"topic_partitions_pkey"}
    assert plan.rows_read("topic_partitions") == count


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("count", "limit"), [(1, 20_000), (1, 100), (PARTITIONS, 20_000), (PARTITIONS, 10)])
def test_place(count: int, limit: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    settings(worker)
    # A transaction that was open when the cursor passed, as there is nearly always one.
    worker.execute("update tidemark.topic_partitions set in_flight = array['4'::xid8]")
    plan = explain(worker, "place_window", "int[], int", (data.ids[:count], limit), mode)
    assert plan.sequential == set()
    assert plan.indexes == {"topic_partitions_pkey", "record_batch_events_pkey"}
    # The late events are sorted (there are none here), to be merged with the others, which come in order.
    assert sum(n["Actual Rows"] for n in plan.nodes if "Sort" in n["Node Type"]) == 0
    placed = max(n["Actual Rows"] for n in plan.nodes if n.get("Operation") == "Insert") or sum(
        n["Actual Rows"] for n in plan.nodes if n.get("Subplan Name") == "CTE pending"
    )
    assert placed >= min(limit, PENDING // PARTITIONS // 100)
    # One more for each partition tells whether there is a rest.
    assert plan.rows_read("record_batch_events") <= placed + count
    # Joining what was placed to the partitions is no product of both.
    assert max(n["Actual Loops"] for n in plan.nodes if n.get("CTE Name") == "pending") <= 2


@pytest.mark.parametrize("mode", MODES)
def test_place_nothing(mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    """A partition that was dispatched twice costs a descent, whatever lies in the index before its cursor."""
    settings(worker)
    worker.execute("update tidemark.topic_partitions set seen_xid = '999999999999'")
    plan = explain(worker, "place_window", "int[], int", (data.ids, 20_000), mode)
    assert plan.rows_read("record_batch_events") == 0
    assert plan.plan["Shared Hit Blocks"] + plan.plan["Shared Read Blocks"] < 12 * PARTITIONS


@pytest.mark.parametrize("mode", MODES)
def test_find_committed(mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    row = worker.execute("select xid::text from tidemark.objects order by id desc offset 9 limit 1").fetchone()
    assert row
    plan = explain(worker, "find_committed", "xid8, xid8[], int", (row[0], ["4", "5"], 50_000), mode)
    assert plan.indexes == {"objects_xid_idx"}
    assert plan.sequential == set()
    assert plan.rows_read("objects") == 10


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page", [10, 10_000])
def test_find_pending(page: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    plan = explain(worker, "find_pending", "int, int, int", (0, page, 5), mode)
    assert plan.sequential & GROWING == set()
    assert "record_batch_events_pkey" in plan.indexes
    assert plan.rows_read("record_batch_events") <= 2 * 5 * min(page, PARTITIONS)
    assert plan.rows_read("topic_partitions") <= min(page, PARTITIONS)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page", [1, PARTITIONS])
@pytest.mark.parametrize("partition", [0, 1])
def test_delete_consumed(partition: int, page: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    """Both a partition with much to delete and, in the skewed case, one with little; alone and with those behind it."""
    visited = data.ids[partition : partition + page]
    row = worker.execute(
        "select count(*) from tidemark.record_batch_events e join tidemark.topic_partitions p on p.id = e.partition_id "
        "where p.id = any (%s) and (e.xid, e.id) <= (p.seen_xid, p.seen_id)",
        (visited,),
    ).fetchone()
    assert row
    worker.execute(statement("transaction_settings"))
    batch = min(row[0], 300)
    values = (data.ids[partition], 300, "0", 0, page)
    plan = explain(worker, "delete_consumed", "int, int, xid8, bigint, int", values, mode)
    assert plan.sequential & GROWING == set()
    # A probe for each partition and what is deleted, which is read again to delete it.
    assert plan.rows_read("record_batch_events") <= 2 * batch + len(visited)
    assert plan.rows_read("topic_partitions") <= len(visited)


def test_the_keys_of_other_tables_are_not_read(data: Data, worker: Connection[TupleRow]) -> None:
    """The fan-out state and the cluster row have a page of their own each."""
    row = worker.execute(
        "select sum(pg_relation_size(c)) from unnest(array['tidemark.cluster', 'tidemark.fan_out_state']::regclass[]) c"
    ).fetchone()
    assert row
    assert row[0] <= 2 * 8192


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("warm", [0, 8])
def test_commit_reads_what_it_names(warm: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    """Validation and the search for a replay, with plans made a moment ago and with cached ones."""
    worker.execute(f"set local plan_cache_mode = {mode}".encode())
    for number in range(warm):
        fill(worker, data.ids[:1], [1], f"warm {number}")
    before = counters(worker)
    fill(worker, data.ids[:7], [3] * 7, "new")
    fill(worker, data.ids[:7], [3] * 7, "new")
    after = counters(worker)
    read = {table: after[table][1] - before.get(table, (0, 0))[1] for table in after}
    assert read["topic_partitions"] <= 2 * PARTITIONS
    assert read["objects"] <= 2
    assert read["record_batch_events"] == 0
    assert all(after[table][0] == before.get(table, (0, 0))[0] for table in GROWING & after.keys())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [0, 300])
def test_fetch_reads_what_it_returns(offset: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    worker.execute(f"set local plan_cache_mode = {mode}".encode())
    for max_bytes, rows in ((3, 3), (10**9, 20)):
        before = counters(worker)
        fetched = worker.execute(
            "select * from tidemark.fetch_batches(%s::int, %s::bigint, %s::bigint, 20)",
            (data.ids[0], offset, max_bytes),
        ).fetchall()
        after = counters(worker)
        assert len(fetched) == rows
        # A loop over a query fetches ahead, ten rows at first.
        assert after["record_batches"][1] - before["record_batches"][1] <= 1 + max(rows, 10)
        assert after["objects"][1] - before["objects"][1] <= max(rows, 10)
        assert after["record_batches"][0] == before["record_batches"][0]
        assert after["objects"][0] == before["objects"][0]


def test_plans_made_for_an_empty_database_do_not_outlive_it(connect: Connect, conn: Connection[TupleRow]) -> None:
    """A worker and a broker that start first, and keep their sessions while the tables grow unanalyzed."""
    for table in (*GROWING, "topic_partitions"):
        conn.execute(f"alter table tidemark.{table} set (autovacuum_enabled = off)".encode())
    create_topic(conn, "first", 1)
    first = partition_ids(conn, "first")
    session = connect()
    fetch = "select * from tidemark.fetch_batches(%s::int, %s::bigint, 1000, 5)"
    for number in range(12):
        fill(session, first, [1], f"warm {number}")
        fill(session, first, [1], f"warm {number}")
        materialize(session, first)
        session.execute(fetch, (first[0], number))
    create_topic(conn, "second", 20_000)
    fill(conn, first, [20_000], "big")
    for number in range(2_000):
        fill(conn, first, [1], f"small {number}")
    with session.transaction():
        before = counters(session)
        fill(session, first, [2], "last")
        fill(session, first, [2], "last")
        # As materialize does, which wants a transaction of its own.
        settings(session)
        run(session, "lock_partitions", (Int4Array(first),))
        run(session, "place_window", (Int4Array(first), 50))
        session.execute(fetch, (first[0], 5))
        after = counters(session)
    read = {table: after[table][1] - before.get(table, (0, 0))[1] for table in after}
    assert read["topic_partitions"] <= 20
    assert read["objects"] <= 20
    assert read["record_batch_events"] <= 52
    assert read["record_batches"] <= 20


@pytest.mark.parametrize("name", ["lock_partitions", "place_window", "delete_consumed", "find_pending"])
def test_no_statement_names_all_columns_of_partitions(name: str) -> None:
    """A new column of the head row must not make the hot statements wider by itself."""
    assert not re.search(r"select p\.\*|select h\.\*", statement(name).decode())
