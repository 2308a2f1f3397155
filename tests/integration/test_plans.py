"""Plans of the hot statements, with the statistics a queue has in its life and with plans made for other values.

The bounds are on rows and on pages, by EXPLAIN ANALYZE where a statement stands in a file, by the server's counters
where it stands inside a function: work goes with the result, not with the history.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow

from config.settings import DEFAULT_STRATEGY, STRATEGIES, Strategy
from db.arrays import Int4Array
from db.commit import commit_object
from db.materialize import materialize
from db.statements import run, statements
from db.topics import create_topic
from tests.integration.conftest import make_topic
from tests.servers import PostgresServer
from tests.support import Connect

STATISTICS = ["empty", "typical", "skewed"]
MODES = ["force_custom_plan", "force_generic_plan"]
GROWING = {"record_batch_events", "runs", "passes", "objects"}
PARTITIONS = 50
CONSUMED = 40_000
PENDING = 20_000


class Data(NamedTuple):
    url: str
    ids: list[int]
    # Events that wait in each.
    pending: list[int]


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
            ids = make_topic(conn, partitions=PARTITIONS)
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
            # A transaction that runs while the cursor passes it, as there is nearly always one.
            with psycopg.connect(url) as other:
                other.execute("select pg_current_xact_id()")
                fill(conn, ids, [1] * PARTITIONS, "beside it")
                materialize(conn, ids, events_per_partition=CONSUMED)
                other.rollback()
            if statistics != "empty":
                conn.execute("analyze")
            pending = [weight * PENDING // CONSUMED for weight in weights]
            fill(conn, ids, pending, "pending")
        yield Data(url, ids, pending)
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

    def rows_read(self, table: str) -> float:
        total = 0.0
        for n in self.nodes:
            if n.get("Relation Name") == table and "Scan" in n["Node Type"]:
                loops, rows = n["Actual Loops"], n["Actual Rows"]
                rows += n.get("Rows Removed by Filter", 0) + n.get("Rows Removed by Index Recheck", 0)
                # Before 18 the rows of a loop are told as a whole number, perhaps rounded up.
                total += loops * rows - (loops / 2 if isinstance(rows, int) and loops > 1 and rows else 0)
        return total


def explain(conn: Connection[Any], name: str, types: str, values: Sequence[object], mode: str) -> Explained:
    """As the program runs it, but for the statement of settings, which is the caller's."""
    conn.execute(f"set local plan_cache_mode = {mode}".encode())
    conn.execute(f"prepare {name} ({types}) as ".encode() + statements()[name])
    literals = sql.SQL(", ").join(map(sql.Literal, values))
    query = sql.SQL("explain (analyze, buffers, format json) execute {} ({})").format(sql.Identifier(name), literals)
    row = conn.execute(query).fetchone()
    assert row
    return Explained(row[0][0]["Plan"])


def settings(conn: Connection[Any], ids: Sequence[int] = ()) -> None:
    """What stands before the statements of a transaction, and what the one that locks leaves to the next."""
    conn.execute(statements()["transaction_settings"])
    conn.execute("select set_config('tidemark.locked', %s::int[]::text, true)", (list(ids),))


def counters(conn: Connection[Any]) -> dict[str, tuple[int, int]]:
    """By table: sequential scans, and rows read by this transaction so far."""
    rows = conn.execute(
        "select relname, seq_scan, seq_tup_read + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables "
        "where schemaname = 'tidemark'"
    ).fetchall()
    return {row[0]: (row[1], row[2]) for row in rows}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, PARTITIONS])
@pytest.mark.parametrize("name", ["lock_partitions", "lock_free_partitions"])
def test_lock(name: str, count: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    settings(worker)
    plan = explain(worker, name, "int[]", (data.ids[:count],), mode)
    assert plan.sequential == set()
    assert plan.indexes == {"topic_partitions_pkey"}
    assert plan.rows_read("topic_partitions") == count


PLACE_INDEXES = {
    "record_batch_events_pkey",
    "runs_pkey",
    "passes_pkey",
    "sweeps_pkey",
    "objects_tx_idx",
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("count", "limit"), [(1, 20_000), (1, 100), (PARTITIONS, 20_000), (PARTITIONS, 10)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_place(strategy: Strategy, count: int, limit: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    settings(worker, data.ids[:count])
    plan = explain(worker, f"place_{strategy}", "int", (limit,), mode)
    assert plan.sequential & GROWING == set()
    assert plan.indexes == PLACE_INDEXES
    placed = [min(limit, waiting) for waiting in data.pending[:count]]
    inserted = worker.execute(
        "select sum(r.batches) from tidemark.runs r where r.xmin = pg_current_xact_id()::xid"
    ).fetchone()
    assert inserted == (sum(placed),)
    # One more for each partition tells whether there is a rest.
    assert plan.rows_read("record_batch_events") <= sum(placed) + count
    assert plan.rows_read("runs") <= count
    # All partitions were served by one pass.
    assert plan.rows_read("passes") == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_place_nothing(strategy: Strategy, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    """A partition that was dispatched twice costs a descent, whatever lies in the index before its cursor."""
    worker.execute(
        "insert into tidemark.runs (partition_id, start_offset, end_offset, end_bytes, max_timestamp, first_tx, "
        "last_tx, batches) "
        "select partition_id, end_offset, end_offset + 1, 1, 1, 10^12, 10^12, 1 from tidemark.cursors(%s)",
        (data.ids,),
    )
    settings(worker, data.ids)
    plan = explain(worker, f"place_{strategy}", "int", (20_000,), mode)
    assert plan.rows_read("record_batch_events") == 0
    assert plan.plan["Shared Hit Blocks"] + plan.plan["Shared Read Blocks"] < 12 * PARTITIONS


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("transactions", "each"), [(1, 2_000), (200, 10)])
def test_place_reads_late_events_once(
    transactions: int, each: int, mode: str, connect: Connect, conn: Connection[TupleRow]
) -> None:
    """However many there are, in however many transactions, and whatever waits behind them. 15 reads them again for
    each step of a recursion that looks for several transactions at once.
    """
    ids = make_topic(conn, partitions=2)
    for strategy in STRATEGIES:
        with ExitStack() as stack:
            late = [stack.enter_context(connect(autocommit=False)) for _ in range(min(transactions, 50))]
            per = transactions * each // len(late)
            for number, writer in enumerate(late):
                # Several commits are one late transaction all the same.
                for part in range(per // each):
                    fill(writer, ids[:1], [each], f"{strategy} late {number} {part}")
            fill(conn, ids, [1, 1], f"{strategy} beside")
            materialize(conn, ids)
        fill(conn, ids, [2_000, 10], f"{strategy} main")
        with conn.transaction(force_rollback=True):
            settings(conn, ids)
            plan = explain(conn, f"place_{strategy}", "int", (20_000,), mode)
            assert plan.sequential & GROWING == set()
            # The window counts the late ones before it takes them.
            once = 2_000 * (2 if strategy == "window" else 1)
            assert plan.rows_read("record_batch_events") <= once + 2_010 + 2 * len(late) + 2
        assert materialize(conn, ids, strategy=strategy).events_processed == 4_010


def test_find_committed(data: Data, worker: Connection[TupleRow]) -> None:
    """It is planned for its values each time."""
    row = worker.execute("select tx from tidemark.objects order by id desc offset 9 limit 1").fetchone()
    assert row
    plan = explain(worker, "find_committed", "bigint, bigint[], int, bigint", (row[0], [4, 5], 50_000, 10**6), MODES[0])
    assert plan.indexes - {"cluster_pkey"} == {"objects_tx_idx"}
    assert plan.sequential & GROWING == set()
    assert plan.rows_read("objects") == 9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page", [10, 10_000])
def test_find_pending(page: int, mode: str, data: Data, worker: Connection[TupleRow]) -> None:
    plan = explain(worker, "find_pending", "int, int, int, int", (0, page, 5, 10**6), mode)
    # Of passes there is a page, which may well be read.
    assert plan.sequential & (GROWING - {"passes"}) == set()
    assert "record_batch_events_pkey" in plan.indexes
    # The first one, and then up to five.
    assert plan.rows_read("record_batch_events") <= 6 * min(page, PARTITIONS)
    assert plan.rows_read("runs") <= min(page, PARTITIONS)
    assert plan.rows_read("topic_partitions") <= min(page, PARTITIONS)


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
    assert read["record_batch_events"] == read["runs"] == 0
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
        # A loop over a query fetches ahead, ten rows at first; and the offset may lie at the end of a run.
        assert after["record_batch_events"][1] - before["record_batch_events"][1] <= 63 + max(rows, 10)
        assert after["runs"][1] - before["runs"][1] <= 2 + 10
        assert after["objects"][1] - before["objects"][1] <= max(rows, 10)
        assert all(after[table][0] == before.get(table, (0, 0))[0] for table in GROWING & after.keys())


def test_plans_made_for_an_empty_database_do_not_outlive_it(connect: Connect, conn: Connection[TupleRow]) -> None:
    """A worker and a broker that start first, and keep their sessions while the tables grow unanalyzed."""
    for table in (*GROWING, "topic_partitions"):
        conn.execute(f"alter table tidemark.{table} set (autovacuum_enabled = off)".encode())
    first = make_topic(conn, "first", partitions=1)
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
        run(session, f"place_{DEFAULT_STRATEGY}", (50,))
        session.execute(fetch, (first[0], 5))
        after = counters(session)
    read = {table: after[table][1] - before.get(table, (0, 0))[1] for table in after}
    assert read["topic_partitions"] <= 20
    assert read["objects"] <= 20
    # Placed, one more, and fetched from a run.
    assert read["record_batch_events"] <= 51 + 63 + 10
    assert read["runs"] <= 20


@pytest.mark.parametrize("name", ["lock_partitions", "lock_free_partitions", "find_pending"])
def test_no_statement_names_all_columns_of_partitions(name: str) -> None:
    """A new column must not make the hot statements wider by itself."""
    assert not re.search(r"select p\.\*|select h\.\*", statements()[name].decode())
