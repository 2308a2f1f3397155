"""`status` and `top`: what waits, what it waits for, and how fast it goes."""

import json
import re
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from io import StringIO
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from psycopg import Connection, sql
from psycopg.pq import ExecStatus, PGconn
from redis import Redis
from rich.console import Console

from db.commit import Batch, commit_batches
from db.discover import find_committed, save_fan_out
from db.materialize import materialize
from db.migrate import upgrade
from db.status import COUNT_LIMIT, read_status
from db.topics import create_topic, delete_topic, partition_ids
from tasks.commands.situation import Situation, read_hints
from tasks.commands.status import Curves, status, top
from tasks.hints import KEY, Program
from tasks.metrics import STUCK_KEY, WorkerMetrics
from tests.integration.conftest import commit, make_topic
from tests.servers import PostgresServer, RedisServer
from tests.support import Connect, frozen, wait_until
from tests.support_commands import Cli, app_for

LONG = "n" * 249


@pytest.fixture
def ids(conn: Connection[Any]) -> list[int]:
    create_topic(conn, LONG, 1)
    return make_topic(conn, partitions=2)


def test_backlog_and_lag(cli: Cli, conn: Connection[Any], ids: list[int]) -> None:
    commit(conn, "a", ids, 5)
    materialize(conn, ids)
    commit(conn, "b", ids[:1])
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '90 s' where key = 'b'")
    commit(conn, "c", ids[:1])
    topics = {topic["topic"]: topic for topic in cli(status, "--json", "--interval", "0").json["topics"]}
    orders = topics["orders"]
    assert 90 <= orders.pop("lag_seconds") < 120
    assert orders == {
        "topic": "orders",
        "partitions": 2,
        "end_offset_sum": 10,
        "end_offset_min": 5,
        "end_offset_max": 5,
        "records": 10,
        "byte_size": 20,
        "backlog_events": 2,
        "backlog_counted": True,
        "backlog_partitions": 1,
        "records_per_second": None,
    }
    assert topics[LONG]["lag_seconds"] is None
    assert [topic["topic"] for topic in cli(status, "orders", "--json", "--interval", "0").json["topics"]] == ["orders"]
    out = cli(status, "--interval", "0").out
    assert re.search(r"^orders +2 +10 +2 +9\d s +-$", out, re.MULTILINE)
    assert out.count("n") >= len(LONG)


def test_a_late_transaction_counts_as_backlog(conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    late = connect(autocommit=False)
    commit(late, "late", ids[:1])
    commit(conn, "a", ids[:1])
    materialize(conn, ids)
    late.commit()
    [partition] = read_status(conn).pending
    assert (partition.partition_id, partition.backlog) == (ids[0], 1)
    assert partition.lag is not None


def test_counting_ends_somewhere(cli: Cli, conn: Connection[Any], ids: list[int]) -> None:
    conn.execute(
        "insert into tidemark.record_batch_events "
        "(tx, id, partition_id, n_records, byte_offset, byte_length, max_timestamp) "
        "select 1, g, %s, 1, 0, 1, 0 from generate_series(1, %s) g",
        (ids[0], COUNT_LIMIT + 5),
    )
    found = cli(status, "orders", "--json", "--interval", "0").json["topics"][0]
    assert (found["backlog_events"], found["backlog_counted"]) == (COUNT_LIMIT, False)
    assert "100,000+" in cli(status, "--interval", "0").out


def test_rate(cli: Cli, conn: Connection[Any], ids: list[int]) -> None:
    commit(conn, "a", ids, 1000)
    before = read_status(conn)
    materialize(conn, ids)
    rates = read_status(conn).rates(before)
    assert rates["orders"] > 0
    assert rates[LONG] == 0
    assert cli(status, "--json", "--interval", "0.05").json["topics"][1]["records_per_second"] == 0


def report(redis_url: str, name: str, *, shards: int = 8, seen: float = 0.0, consumes: Sequence[int] = ()) -> None:
    """As a program does that was last heard of `seen` seconds ago; it is called `worker@…` or `beat@…`."""
    with Redis.from_url(redis_url) as redis:
        seconds, micros = redis.time()
        now = seconds + micros / 1e6
        program, _, host = name.partition("@")
        entry = Program(
            program=program,
            name=name,
            host=host,
            pid=1,
            shards=shards,
            since=now - 600,
            seen=now - seen,
            consumes=tuple(consumes),
        )
        redis.hset(KEY, f"{name}/1", json.dumps(asdict(entry)))


def waits_for(cli: Cli) -> dict[int, str]:
    found = cli(status, "orders", "--json", "--interval", "0", "--after", "0").json["waiting"]
    return {p["partition"]: p["waits_for"] for p in found}


def test_programs_that_do_not_run(cli: Cli, conn: Connection[Any], redis_url: str, ids: list[int]) -> None:
    """One cause at a time: no worker, no beat, a beat that fell silent, a fan-out that is behind; then the queue."""
    commit(conn, "a", ids)
    assert set(waits_for(cli).values()) == {"no worker runs"}
    report(redis_url, "worker@one", seen=61)
    assert set(waits_for(cli).values()) == {"no worker runs"}
    report(redis_url, "worker@one", seen=20)
    assert set(waits_for(cli).values()) == {"no worker sign for 20 s"}
    report(redis_url, "worker@one", seen=3)
    assert set(waits_for(cli).values()) == {"no beat runs"}
    report(redis_url, "beat@one", seen=40)
    assert set(waits_for(cli).values()) == {"no beat tick for 40 s"}
    report(redis_url, "beat@two")
    assert set(waits_for(cli).values()) == {"fan-out, which is behind"}
    save_fan_out(conn, find_committed(conn))
    assert waits_for(cli) == {n: f"a worker on materialize.{i % 8}" for n, i in enumerate(ids)}
    words = cli(status, "--interval", "0", "--after", "0").words
    assert re.search(rf"\d\.\d s, 2 events: orders/0-1 a worker on shards {ids[0]}-{ids[1]}", words)
    report(redis_url, "worker@one", consumes=[ids[0] % 8])
    expected = {0: f"worker worker@one on materialize.{ids[0] % 8}", 1: f"no worker on materialize.{ids[1] % 8}"}
    assert waits_for(cli) == expected


def test_programs_as_they_report(cli: Cli, redis_url: str) -> None:
    """The living ones are read, by Redis' clock, and those with another number of shards are named."""
    report(redis_url, "worker@one", seen=59)
    report(redis_url, "worker@two", seen=61)
    report(redis_url, "beat@one", shards=16)
    found = cli(status, "--json", "--interval", "0").json["programs"]
    assert [(p["name"], p["program"], p["host"], p["shards"]) for p in found] == [
        ("beat@one", "beat", "one", 16),
        ("worker@one", "worker", "one", 8),
    ]
    assert 59 <= found[1]["seen"] < 61
    assert 599 <= found[1]["up"] < 602
    assert "TIDEMARK_SHARDS differs: 8: this command, worker@one; 16: beat@one" in cli(status, "--interval", "0").words


@pytest.mark.parametrize("way", ["update", "no key update", "savepoint", "share by two"])
def test_a_locked_partition_that_nobody_waits_for(
    way: str, cli: Cli, conn: Connection[Any], connect: Connect, redis_url: str, ids: list[int]
) -> None:
    """Workers pass over it. One line names the session that holds it, what it runs and the statement that ends it."""
    commit(conn, "a", ids)
    blocker, other = connect(autocommit=False), connect(autocommit=False)
    blocker.execute("set application_name = 'psql'")
    if way == "savepoint":
        blocker.execute("savepoint a")
    if way == "share by two":
        other.execute("select from tidemark.topic_partitions where topic_id is not null for share")
    strength = "share" if way == "share by two" else way.replace("savepoint", "update")
    blocker.execute(f"select from tidemark.topic_partitions for {strength} -- a comment".encode())
    assert materialize(conn, ids, wait=False).busy_partition_ids == tuple(ids)
    report(redis_url, "worker@one", consumes=range(8))
    cli.app.once(WorkerMetrics).keep({"orders/0": f"{time.time():.0f} ValueError: locked\nfor long"}, STUCK_KEY)
    cli.app.once(WorkerMetrics).flush()
    found = cli(status, "--json", "--interval", "0", "--after", "0").json
    pids = {blocker.info.backend_pid} | ({other.info.backend_pid} if way == "share by two" else set())
    assert {lock["pid"] for lock in found["row_locks"]} == pids
    assert all(set(lock["partition_ids"]) == set(ids) for lock in found["row_locks"])
    # Of two the older one.
    pid = blocker.info.backend_pid
    assert {p["repair"] for p in found["waiting"]} == {f"select pg_terminate_backend({pid});"}
    assert {p["waits_for"].partition(",")[0] for p in found["waiting"]} == {f"blocked by pid {pid}"}
    words = cli(status, "--interval", "0", "--after", "0").words
    assert "(psql), idle in transaction, transaction open 0." in words
    # Named once, and not again among what is open.
    assert words.count(f"pid {pid}") == 1
    assert "s select from tidemark.topic_partitions for" in words
    assert words.count(f"select pg_terminate_backend({pid});") == 1
    assert "worker worker@one has tried orders/0: ValueError: locked for long" in words
    blocker.rollback()
    other.rollback()
    assert cli(status, "--json", "--interval", "0").json["row_locks"] == []


def test_one_line_for_all_that_wait_for_the_same(cli: Cli, conn: Connection[Any], connect: Connect) -> None:
    create_topic(conn, "clicks", 56)
    commit(conn, "a", partition_ids(conn, "clicks"))
    connect(autocommit=False).execute("select from tidemark.topic_partitions for update")
    out = cli(status, "--interval", "0", "--after", "0").out
    assert len(re.findall(r"^  \d\.\d s, 56 events: clicks/0-55$", out, re.MULTILINE)) == 1
    assert out.count("blocked by") == 1


def test_a_worker_at_work_is_no_obstacle(cli: Cli, conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    """It holds the row as well, but not for long."""
    commit(conn, "a", ids)
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 h'")
    connect(autocommit=False).execute("select from tidemark.topic_partitions for no key update")
    [reason] = {p["waits_for"] for p in cli(status, "--json", "--interval", "0").json["waiting"]}
    assert reason == "no worker runs"


def test_a_locked_table(cli: Cli, conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    """As `create index` locks it, which lets nobody write: every partition waits for that session."""
    commit(conn, "a", ids)
    blocker, worker = connect(autocommit=False), connect()
    blocker.execute("lock table tidemark.runs in share mode")
    worker.execute("set application_name = 'tidemark'")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(materialize, worker, ids[:1])

        def blocked() -> bool:
            by = f"blocked by pid {blocker.info.backend_pid},"
            return all(why.startswith(by) for why in waits_for(cli).values())

        wait_until(blocked)
        blocker.rollback()
        assert running.result(30).events_processed == 1


def test_redis_that_hangs_or_is_away(
    conn: Connection[Any], database_url: str, server_directory: Path, redis_binary: Path | None, ids: list[int]
) -> None:
    """Postgres' side is shown all the same, within a second more, and the cause is named."""
    commit(conn, "a", ids)
    with RedisServer(server_directory / "stopped", binary=redis_binary).start() as server:
        with Redis.from_url(server.url) as redis:
            pid = int(redis.info("server")["process_id"])
        with app_for(database_url, server.url) as app, frozen(pid):
            began = time.monotonic()
            words = Cli(app)(status, "--interval", "0", "--after", "0").words
            assert time.monotonic() - began < 2
    assert "Redis does not answer: Timeout" in words
    assert "orders 2 0 2 0." in words
    assert "Redis does not answer start it, or correct TIDEMARK_BROKER_URL" in words
    with app_for(database_url, "redis://:secret@127.0.0.1:1/0") as app:
        found = Cli(app)(status, "--json", "--interval", "0", "--after", "0").json
        assert {p["waits_for"] for p in found["waiting"]} == {"Redis does not answer"}
        assert "Connection refused" in found["redis_error"]
        assert "secret" not in Cli(app)(status, "--interval", "0").out


def test_without_a_redis_nobody_knows_the_programs(conn: Connection[Any], database_url: str, ids: list[int]) -> None:
    commit(conn, "a", ids)
    with app_for(database_url, "amqp://guest@127.0.0.1:1//") as app:
        assert set(waits_for(Cli(app)).values()) == {"fan-out"}


def test_status_fits_80_columns(cli: Cli, conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    """On a terminal names end in an ellipsis; in a pipe no name is broken in two."""
    commit(conn, "a", [*ids, *partition_ids(conn, LONG)])
    connect(autocommit=False).execute("select from tidemark.topic_partitions for update -- " + "long " * 50)
    found = Situation(
        reading=read_status(conn), rates=None, hints=read_hints(cli.app), settings=cli.app.settings, after=0
    )
    screen = Console(width=80, file=StringIO())
    with screen.capture() as shown:
        screen.print(found.render())
        screen.print(found.render(lambda _: ("▁" * 10, "█" * 10)))
    assert max(map(len, shown.get().splitlines())) <= 80
    assert "n…" in shown.get()
    out = cli(status, "--interval", "0", "--after", "0").out
    assert out.count(LONG) == 2


def test_what_a_partition_waits_for(cli: Cli, conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    commit(conn, "a", ids)
    save_fan_out(conn, find_committed(conn))
    blocker, waiter = connect(autocommit=False), connect()
    blocker.execute("select from tidemark.topic_partitions where id = %s for update -- a comment", (ids[1],))
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(materialize, waiter, ids)

        def lock_waits() -> Any:
            return cli(status, "--json", "--interval", "0", "--after", "0").json["lock_waits"]

        [wait] = wait_until(lock_waits)
        assert (wait["pid"], wait["blocker_pid"]) == (waiter.info.backend_pid, blocker.info.backend_pid)
        assert (wait["topic"], wait["partition"]) == ("orders", 1)
        assert (wait["blocker_state"], wait["blocker_gid"]) == ("idle in transaction", None)
        # Not what its first line is, for pg_hint_plan.
        assert read_status(conn).lock_waits[0].query.startswith("-- Locks partitions")
        words = cli(status, "--interval", "0", "--after", "0").words
        assert f"pid {wait['pid']} has waited" in words
        assert f"select pg_terminate_backend({wait['blocker_pid']});" in words
        # Its waiter has the other one locked, and is not to blame for it.
        assert "s, 2 events: orders/0-1 blocked" in words
        assert f"blocked by pid {wait['blocker_pid']}" in words
        # Everyday waits are left out.
        assert "has waited" not in cli(status, "--interval", "0").out
        blocker.rollback()
        assert running.result(30).events_processed == 2


def test_why_a_partition_cannot_be_materialized(
    cli: Cli, conn: Connection[Any], redis_url: str, ids: list[int]
) -> None:
    commit(conn, "a", ids)
    save_fan_out(conn, find_committed(conn))
    error = ValueError("disk on fire")
    cli.app.once(WorkerMetrics).keep({"orders/1": f"{time.time():.0f} {type(error).__name__}: {error}"}, STUCK_KEY)
    cli.app.once(WorkerMetrics).flush()
    report(redis_url, "worker@one")
    assert waits_for(cli) == {
        0: f"a worker on materialize.{ids[0] % 8}",
        1: "fails with ValueError: disk on fire",
    }


def holders(cli: Cli) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = cli(status, "--json", "--interval", "0").json["holders"]
    return found


def test_an_open_transaction(cli: Cli, conn: Connection[Any], connect: Connect, ids: list[int]) -> None:
    late, empty = connect(autocommit=False), connect(autocommit=False)
    late.execute("set application_name = 'slow broker'")
    commit(late, "late", ids)
    # Without an id and a snapshot it holds nothing.
    empty.execute("select 1")
    [held] = holders(cli)
    assert (held["kind"], held["name"], held["application"]) == ("session", str(late.info.backend_pid), "slow broker")
    assert (held["has_id"], held["state"]) == (True, "idle in transaction")
    words = cli(status, "--interval", "0", "--after", "0").words
    assert "(slow broker), idle in transaction, transaction open" in words
    assert f", with an id, in {conn.info.dbname}" in words
    # Everyday transactions are left out.
    assert "slow broker" not in cli(status, "--interval", "0").words
    late.rollback()
    assert holders(cli) == []


def test_a_held_snapshot(cli: Cli, conn: Connection[Any], connect: Connect) -> None:
    """It has no id, so nobody waits for what it commits; vacuum does."""
    report = connect(autocommit=False)
    report.execute("set transaction isolation level repeatable read")
    report.execute("select 1")
    [held] = holders(cli)
    assert (held["kind"], held["name"], held["has_id"]) == ("session", str(report.info.backend_pid), False)
    words = cli(status, "--interval", "0", "--after", "0").words
    assert f"pid {report.info.backend_pid}" in words
    assert "with an id, in" not in words


def test_a_restored_database(cli: Cli, conn: Connection[Any], ids: list[int]) -> None:
    commit(conn, "a", ids)
    conn.execute("update tidemark.cluster set system_identifier = 1")
    assert cli(status, "--json", "--interval", "0").json["own_cluster"] is False
    words = cli(status, "--interval", "0", "--after", "0").words
    assert "the database was restored into another cluster. Run: celery -A tasks rebase" in words


def test_a_role_that_may_not_see_other_sessions(
    cli: Cli, conn: Connection[Any], connect: Connect, database_url: str, redis_url: str, ids: list[int]
) -> None:
    role = f"watcher_{conn.info.backend_pid}"
    name = sql.Identifier(role)
    conn.execute(sql.SQL("create role {} login").format(name))
    try:
        conn.execute(sql.SQL("grant usage on schema tidemark to {}").format(name))
        conn.execute(sql.SQL("grant select on all tables in schema tidemark to {}").format(name))
        conn.execute(sql.SQL("grant execute on all functions in schema tidemark to {}").format(name))
        commit(conn, "a", ids)
        blocker = connect(autocommit=False)
        blocker.execute("select from tidemark.topic_partitions for update")
        with app_for(database_url.replace("//tidemark@", f"//{role}@"), redis_url) as app:
            found = Cli(app)(status, "--json", "--interval", "0", "--after", "0").json
            words = Cli(app)(status, "--interval", "0", "--after", "0").words
        assert found["topics"][1]["backlog_events"] == 2
        # How old its transaction is, and what it runs, is hidden; who it is, is not.
        [lock] = found["row_locks"]
        assert (lock["pid"], lock["age"], lock["state"]) == (blocker.info.backend_pid, None, None)
        assert "grant pg_monitor to <role>" in words
    finally:
        conn.execute(sql.SQL("drop owned by {0}; drop role {0}").format(name))


def test_top_prints_lines_without_a_terminal(cli: Cli, ids: list[int], conn: Connection[Any]) -> None:
    commit(conn, "a", ids)
    done = CliRunner().invoke(top, ["--count", "2", "--interval", "0.1"], obj=type("O", (), _context(cli))())
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert re.fullmatch(r"\S+ orders end=0 backlog=2 lag=\d\.\ds records/s=0", lines[1])


def _context(cli: Cli) -> dict[str, Any]:
    return {"app": cli.app, "no_color": False}


def test_top_prints_json_lines(cli: Cli, ids: list[int]) -> None:
    assert ids
    lines = cli(top, "orders", "--count", "2", "--interval", "0.1", "--json").out.splitlines()
    assert [json.loads(line)["topics"][0]["topic"] for line in lines] == ["orders", "orders"]


def test_curves_of_lag_and_rate(cli: Cli, conn: Connection[Any], ids: list[int]) -> None:
    """A bar a look at first, then one for several; what is older than five minutes falls off."""
    commit(conn, "a", ids)
    reading = read_status(conn, ["orders"])
    curves = Curves(10.0)

    def look(number: int) -> None:
        pending = [replace(p, lag=float(number)) for p in reading.pending]
        curves.add(
            Situation(
                reading=replace(reading, pending=pending),
                rates={"orders": 0.0},
                hints=read_hints(cli.app),
                settings=cli.app.settings,
                after=5,
            )
        )

    for number in range(1, 100):
        look(number)
        lag, rate = curves.of("orders")
        assert len(lag) == len(rate) == 10
        assert set(rate) <= {" ", "▁"}
        assert lag[-1] == "█"
        if number <= 10:
            assert len(lag.strip()) == number
    assert 300 <= curves.seconds <= 400
    assert curves.of("another")[0] == "▁" * 10


@pytest.fixture(scope="module")
def own_server(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    settings = {"max_prepared_transactions": "5", "wal_level": "logical", "max_wal_senders": "2", "fsync": "off"}
    with PostgresServer(server_directory / "holders", bin_dir=postgres_bin, settings=settings).start() as server:
        upgrade(server.url())
        yield server


def test_prepared_transactions(own_server: PostgresServer, redis_url: str) -> None:
    with (
        psycopg.connect(own_server.url(), autocommit=True) as conn,
        psycopg.connect(own_server.url(), autocommit=True) as waiter,
        app_for(own_server.url(), redis_url) as app,
    ):
        cli = Cli(app)
        ids = make_topic(conn, partitions=1)
        conn.execute("begin")
        commit(conn, "late", ids)
        conn.execute("prepare transaction 'it''s late'")
        commit(conn, "a", ids)
        materialize(conn, ids)
        conn.execute("begin; select from tidemark.topic_partitions for update; prepare transaction 'lock'")
        commit(conn, "b", ids)
        [lock] = cli(status, "--json", "--interval", "0").json["row_locks"]
        assert (lock["pid"], lock["gid"], lock["partition_ids"]) == (0, "lock", ids)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(materialize, waiter, ids)

            def lock_waits() -> Any:
                return cli(status, "--json", "--interval", "0").json["lock_waits"]

            [wait] = wait_until(lock_waits)
            assert (wait["blocker_pid"], wait["blocker_gid"], wait["topic"]) == (0, "lock", "orders")
            found = {h["name"] for h in holders(cli) if h["kind"] == "prepared transaction" and h["has_id"]}
            assert found == {"it's late", "lock"}
            words = cli(status, "--interval", "0", "--after", "0").words
            assert "held by prepared transaction lock" in words
            assert "prepared transaction it's late of" in words
            assert "rollback prepared 'it''s late';" in words
            conn.execute("rollback prepared 'lock'")
            running.result(30)
        conn.execute("rollback prepared 'it''s late'")


def test_replication_slots_and_standbys(own_server: PostgresServer, redis_url: str) -> None:
    """They have no transaction of their own to measure: what counts is the oldest commit that they do not see."""
    with psycopg.connect(own_server.url(), autocommit=True) as conn, app_for(own_server.url(), redis_url) as app:
        cli = Cli(app)
        ids = make_topic(conn, "replicated", partitions=1)
        commit(conn, "before", ids)
        conn.execute("select pg_create_logical_replication_slot('cdc', 'pgoutput')")
        (xmin,) = conn.execute("select txid_current()").fetchone() or (0,)
        standby = PGconn.connect(f"{own_server.url()}&replication=true&application_name=copy".encode())
        assert standby.exec_(b"START_REPLICATION 0/1000000").status == ExecStatus.COPY_BOTH
        # Its feedback: the oldest transaction that it needs.
        standby.put_copy_data(struct.pack("!cqIIII", b"h", 0, xmin, 0, 0, 0))
        standby.flush()

        def both() -> dict[str, Any]:
            found = {h["kind"]: h for h in holders(cli)}
            return found if len(found) == 2 else {}

        idle = wait_until(both)
        assert (idle["replication slot"]["name"], idle["replication slot"]["state"]) == ("cdc", "inactive")
        assert idle["standby"]["application"] == "copy"
        # Nothing was committed since.
        assert {h["seconds"] for h in idle.values()} == {None}
        commit(conn, "after", ids)
        conn.execute("update tidemark.objects set committed_at = committed_at - interval '2 h' where key = 'before'")
        conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 h' where key = 'after'")
        assert all(3600 <= h["seconds"] < 3700 for h in both().values())
        words = cli(status, "--interval", "0", "--after", "3000").words
        assert "replication slot cdc, inactive, 60 min behind" in words
        assert "(copy), active, 60 min behind" in words
        standby.finish()


def test_what_is_yet_to_be_deleted(cli: Cli, conn: Connection[Any], ids: list[int]) -> None:
    assert cli(status, "--json", "--interval", "0").json["to_delete"] == {"partitions": 0, "objects": 0}
    refused = Batch(partition_id=999, n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
    commit_batches(conn, "refused", [refused])
    delete_topic(conn, "orders")
    assert cli(status, "--json", "--interval", "0").json["to_delete"] == {"partitions": len(ids), "objects": 1}
    assert f"Deleted topics: {len(ids)} partition" in cli(status, "--interval", "0").out
