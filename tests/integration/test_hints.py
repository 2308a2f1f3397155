"""With the extension pg_hint_plan, hints alone hold the plans: no setting of ours, statistics that tempt the planner.

Run by `pytest -m hints` against a Postgres that has the extension; skipped where none is found.
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.pq import ExecStatus
from psycopg.rows import TupleRow

from config.embedded.host import postgres_bin as wheel_bin
from config.settings import Settings, Strategy
from db.discover import find_committed, sweep
from db.doctor import examine
from db.materialize import materialize
from db.migrate import upgrade
from db.retention import retain
from db.statements import statements
from db.topics import create_topic, partition_ids
from tests.integration.conftest import make_topic
from tests.integration.test_plans import Explained, fill
from tests.servers import PostgresServer
from tests.support_hints import GROWING, HINTED, phrases, scans

pytestmark = pytest.mark.hints

MODES = ["force_custom_plan", "force_generic_plan"]
PARTITIONS = 10
EACH = 3
# What `transaction_settings` turns off is on here, or it would be that which holds the plans.
UNTOUCHED = [
    "seqscan",
    "indexscan",
    "indexonlyscan",
    "bitmapscan",
    "hashjoin",
    "mergejoin",
    "nestloop",
    "material",
    "sort",
]


def _asked(program: Path | str, option: str) -> Path | None:
    """What a pg_config answers; None where there is none."""
    try:
        answer = subprocess.run([program, option], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return Path(answer.strip())


@pytest.fixture(scope="module")
def server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    """TIDEMARK_TEST_POSTGRES_BIN's Postgres; without that the wheel's or the system's, whichever has the extension."""
    places = [postgres_bin] if postgres_bin else [wheel_bin(), _asked("pg_config", "--bindir")]
    for place in places:
        libraries = _asked(place / "pg_config", "--pkglibdir") if place else None
        if libraries and list(libraries.glob("pg_hint_plan.*")):
            break
    else:
        pytest.skip(
            "no Postgres with pg_hint_plan: install it (Debian 13: apt-get install postgresql-17-pg-hint-plan), and "
            "let TIDEMARK_TEST_POSTGRES_BIN name the directory of that Postgres' programs"
        )
    settings = {"fsync": "off", "autovacuum": "off", "session_preload_libraries": "pg_hint_plan"}
    with PostgresServer(server_directory / "hints", bin_dir=place, settings=settings).start() as started:
        upgrade(started.url())
        yield started


class Database(NamedTuple):
    url: str
    ids: list[int]


@pytest.fixture(scope="module")
def tempting(server: PostgresServer) -> Database:
    """A page of each table, and statistics that know of the partitions and of one row in each of the others."""
    with psycopg.connect(server.url(), autocommit=True) as conn:
        create_topic(conn, "orders", PARTITIONS)
        conn.execute("analyze")
        conn.execute("update tidemark.topics set retention_bytes = 1")
        ids = partition_ids(conn, "orders")
        fill(conn, ids, [EACH] * PARTITIONS, "consumed")
        materialize(conn, ids)
        fill(conn, ids, [EACH] * PARTITIONS, "pending")
        conn.execute(
            "update pg_class set reltuples = 1, relpages = 1 where relnamespace = 'tidemark'::regnamespace "
            "and relname in ('objects', 'record_batch_events', 'runs', 'passes', 'log_starts')"
        )
    return Database(server.url(), ids)


@pytest.fixture
def worker(tempting: Database) -> Iterator[Connection[TupleRow]]:
    with psycopg.connect(tempting.url) as conn:
        for name in UNTOUCHED:
            row = conn.execute(
                "select setting = boot_val from pg_settings where name = %s", (f"enable_{name}",)
            ).fetchone()
            assert row == (True,)
        yield conn
        conn.rollback()


def listen(conn: Connection[Any]) -> list[str]:
    """From here on, what pg_hint_plan says of the hints it met."""
    heard: list[str] = []
    conn.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
    for name, value in (("debug_print", "on"), ("message_level", "notice"), ("parse_messages", "warning")):
        conn.execute(f"set pg_hint_plan.{name} = {value}".encode())
    return heard


class Report(NamedTuple):
    """What became of a statement's hints."""

    used: int
    unused: int
    duplicate: int
    wrong: int


def reports(heard: Sequence[str]) -> list[Report]:
    """One for each statement planned; any complaint about the syntax fails."""
    found = []
    for message in heard:
        if message.startswith("available indexes for "):
            continue
        assert message.startswith("pg_hint_plan:\n"), message
        parts = re.split(r"^(?:used|not used|duplication|error) hint:$", message, flags=re.MULTILINE)
        found.append(Report(*(len(part.split("\n")) - 2 for part in parts[1:])))
    return found


def prepare(conn: Connection[Any], name: str) -> None:
    """As psycopg does it: the text of the file is all that is sent."""
    result = conn.pgconn.prepare(name.encode(), statements()[name])
    assert result.status == ExecStatus.COMMAND_OK, result.error_message


def explain(conn: Connection[Any], name: str, values: Sequence[object]) -> Explained:
    literals = sql.SQL(", ").join(map(sql.Literal, values))
    execute = sql.SQL("execute {} ({})" if values else "execute {}").format(sql.Identifier(name), literals)
    row = conn.execute(sql.SQL("explain (analyze, format json) ") + execute).fetchone()
    assert row
    return Explained(row[0][0]["Plan"])


def lock(conn: Connection[Any], ids: list[int]) -> None:
    """What the statement that locks tells the one that places."""
    conn.execute("select set_config('tidemark.locked', %s::int[]::text, true)", (ids,))


def values(name: str, ids: list[int]) -> tuple[object, ...]:
    return {
        "delete_expired": (100,),
        "find_committed": (3, [4], 100, 1_000),
        "find_pending": (0, 100, 100, 1_000),
        "lock_free_partitions": (ids,),
        "lock_partitions": (ids,),
        "place_incremental": (EACH - 1,),
        "place_window": (EACH - 1,),
    }[name]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HINTED)
def test_hints_hold_the_plan(name: str, mode: str, tempting: Database, worker: Connection[TupleRow]) -> None:
    heard = listen(worker)
    worker.execute(f"set plan_cache_mode = {mode}".encode())
    lock(worker, tempting.ids)
    prepare(worker, name)
    plan = explain(worker, name, values(name, tempting.ids))
    assert plan.sequential & GROWING == set()
    assert plan.kinds & {"Hash Join", "Merge Join", "Materialize", "Bitmap Heap Scan"} == set()
    # EXPLAIN numbers an alias when it comes again. Tables that do not grow may be read in any way.
    used = {
        (re.sub(r"_\d+$", "", node["Alias"]), node.get("Index Name"))
        for node in plan.nodes
        if node["Node Type"].endswith("Scan") and node.get("Relation Name") in GROWING
    }
    assert used <= set(scans(name).items())
    if name.startswith("place_"):
        assert max(n["Actual Rows"] for n in plan.nodes if n.get("CTE Name") in {"run", "step"}) > 0
    # A function called by a statement is planned under the statement's hint, and has no use for it.
    assert Report(len(phrases(name)), 0, 0, 0) in reports(heard)
    assert {report for report in reports(heard) if report.used} == {Report(len(phrases(name)), 0, 0, 0)}
    assert not any(report.duplicate or report.wrong for report in reports(heard))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", HINTED)
def test_without_hints_the_planner_gives_in(
    name: str, mode: str, tempting: Database, worker: Connection[TupleRow]
) -> None:
    """Or the test above would prove nothing."""
    worker.execute("set pg_hint_plan.enable_hint = off")
    worker.execute(f"set plan_cache_mode = {mode}".encode())
    lock(worker, tempting.ids)
    prepare(worker, name)
    plan = explain(worker, name, values(name, tempting.ids))
    assert plan.sequential & GROWING


@pytest.mark.parametrize("hints", ["on", "off"])
def test_a_plan_made_for_empty_tables_serves_full_ones(hints: str, server: PostgresServer) -> None:
    """A worker that starts first and keeps its plan: what it reads goes with what it places, thanks to the hint."""
    name = f"grows_{hints}"
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
    url = server.url(name)
    upgrade(url)
    with psycopg.connect(url, autocommit=True) as broker, psycopg.connect(url, autocommit=True) as worker:
        ids = make_topic(broker, "orders", partitions=PARTITIONS)
        broker.execute("analyze")
        worker.execute(f"set pg_hint_plan.enable_hint = {hints}".encode())
        worker.execute("set plan_cache_mode = force_generic_plan")
        prepare(worker, "place_window")
        with worker.transaction():
            lock(worker, ids)
            explain(worker, "place_window", (10,))
        fill(broker, ids, [500] * PARTITIONS, "many")
        with worker.transaction():
            lock(worker, ids)
            read = explain(worker, "place_window", (10,)).rows_read("record_batch_events")
        if hints == "on":
            assert read <= 10 * PARTITIONS + PARTITIONS
        else:
            assert read > 500 * PARTITIONS


def test_hints_are_used_on_the_way_they_are_sent(server: PostgresServer) -> None:
    """Pipelined, prepared, beside our settings, inside of loops: whatever the program does."""
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute("create database way")
    upgrade(server.url("way"))
    strategies: list[Strategy] = ["window", "incremental"]
    with psycopg.connect(server.url("way"), autocommit=True) as conn:
        create_topic(conn, "orders", PARTITIONS)
        conn.execute("update tidemark.topics set retention_bytes = 1")
        ids = partition_ids(conn, "orders")
        heard = listen(conn)
        for strategy in strategies:
            fill(conn, ids, [EACH] * PARTITIONS, strategy)
            assert find_committed(conn).commits > 0
            assert [pending.events for pending in sweep(conn)] == [EACH] * PARTITIONS
            assert materialize(conn, ids, strategy=strategy).events_processed == EACH * PARTITIONS
        assert retain(conn).deleted > 0
    told = reports(heard)
    assert {report.used for report in told if report.used} == {len(phrases(name)) for name in HINTED}
    assert not any(report.used and report.unused for report in told)
    assert not any(report.duplicate or report.wrong for report in told)


def test_the_doctor_tells_whether_hints_are_used(server: PostgresServer) -> None:
    settings = Settings(database_url="postgresql://u@h/d", broker_url="redis://h")
    with psycopg.connect(server.url(), autocommit=True) as conn:
        for value, found in (("on", "are used"), ("off", "enable_hint is off")):
            conn.execute(f"set pg_hint_plan.enable_hint = {value}".encode())
            findings = list(examine(conn, settings))
            assert [found in finding.found for finding in findings if finding.check == "pg_hint_plan"] == [True]
