"""The exporter's output: true, clean, bounded, and there when the servers are not."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import psycopg
import pytest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from psycopg import Connection, errors
from psycopg.rows import TupleRow
from redis import Redis

import db.status
from config.errors import TidemarkError, UnknownPartitionError
from config.settings import DEFAULT_STRATEGY, Settings
from db.audit import audit
from db.materialize import MaterializationMetrics, Moved, ages_of_run, materialize
from db.statements import run, statements
from db.topics import create_topic, partition_ids
from tasks import metrics
from tasks.app import TidemarkApp
from tasks.compare import Side
from tasks.drain import DrainMetrics
from tasks.exporter import Exporter, Source
from tasks.hints import Membership
from tasks.metrics import WorkerMetrics
from tasks.names import PartitionNames
from tests.integration import conftest
from tests.integration.conftest import MakeApp, make_topic
from tests.servers import PostgresServer, RedisServer
from tests.support import Connect, frozen, wait_until
from tests.support_commands import drain

ROOT = Path(__file__).parents[2]
PROMTOOL = shutil.which("promtool")
WITHOUT_PROMTOOL = (
    "promtool is not installed (Debian: apt-get install prometheus); a parser looked at the names instead"
)
SETTINGS: dict[str, Any] = {"metrics_seconds": 0.001, "lock_timeout": 0.2, "retries": 1, "retry_seconds": 0.01}
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """One answer of the exporter."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families: list[Metric] = list(text_string_to_metric_families(text))
        self.values: Values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get((f"tidemark_{name}", frozenset(labels.items())))

    def label_values(self, name: str, label: str) -> set[str]:
        return {dict(labels)[label] for (found, labels) in self.values if found == f"tidemark_{name}"}


@pytest.fixture
def app(make_app: MakeApp, tmp_path: Path) -> TidemarkApp:
    return make_app(**SETTINGS, data_dir=tmp_path)


@pytest.fixture
def exporter(app: TidemarkApp) -> Iterator[Exporter]:
    with Exporter(app, "127.0.0.1", 0) as exporter:
        yield exporter


def get(exporter: Exporter, path: str = "metrics") -> str:
    with urllib.request.urlopen(f"{exporter.url}{path}", timeout=15) as response:
        body: bytes = response.read()
        return body.decode()


def scrape(exporter: Exporter) -> Scrape:
    # A source rests after it was read.
    time.sleep(0.01)
    for source in exporter._sources:
        source._until = 0.0
    return Scrape(get(exporter))


commit = partial(conftest.commit, records=3)


@pytest.fixture
def orders(conn: Connection[TupleRow]) -> list[int]:
    return make_topic(conn, partitions=4)


# --- What it says


def test_backlog_lag_and_offsets(exporter: Exporter, conn: Connection[TupleRow], orders: list[int]) -> None:
    create_topic(conn, "idle", 2)
    commit(conn, "a", [orders[0]] * 3 + [orders[2]])
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 hour'")
    commit(conn, "b", orders[:1])
    before = scrape(exporter)
    assert before("backlog_events", topic="orders") == 5
    assert before("backlog_partitions", topic="orders") == 2
    assert before("backlog_overdue_partitions", topic="orders") == 2
    assert 3600 <= (before("lag_seconds", topic="orders") or 0) < 3660
    assert before("backlog_events", topic="idle") == before("lag_seconds", topic="idle") == 0
    assert 3600 <= (before("fan_out_waiting_seconds") or 0) < 3660
    assert before("records_total", topic="orders") == 0

    materialize(conn, orders)
    after = scrape(exporter)
    assert after("backlog_events", topic="orders") == after("lag_seconds", topic="orders") == 0
    assert after("records_total", topic="orders") == after("log_records", topic="orders") == 15
    assert after("log_bytes", topic="orders") == 50
    assert after("audit_unread_records") == 15
    assert (after("topics"), after("partitions", topic="orders"), after("cluster_matches")) == (2, 4, 1)
    assert (after("table_size_bytes", table="runs") or 0) > 0
    assert (after("index_size_bytes", table="runs", index="runs_pkey") or 0) > 0


def test_open_transactions(exporter: Exporter, connect: Connect, orders: list[int]) -> None:
    late, report, conn = connect(autocommit=False), connect(autocommit=False), connect()
    commit(late, "late", orders[:1])
    commit(conn, "early", orders[:1])
    materialize(conn, orders[:1])
    report.execute("set transaction isolation level repeatable read")
    report.execute("select 1")

    def held_for_a_while() -> Scrape | None:
        found = scrape(exporter)
        return found if (found("vacuum_held_seconds", holder="session") or 0) >= 0.1 else None

    held = wait_until(held_for_a_while)
    assert held
    assert held("open_transactions") == 1
    assert (held("open_transaction_seconds") or 0) >= 0.1
    assert held("vacuum_held_seconds", holder="replication slot") == 0
    assert held("backlog_events", topic="orders") == 0
    late.commit()
    committed = scrape(exporter)
    assert committed("open_transactions") == committed("open_transaction_seconds") == 0
    # The snapshot has no id, and vacuum waits for it all the same.
    assert (committed("vacuum_held_seconds", holder="session") or 0) >= 0.1
    # What was committed lies below the position, and is pending all the same.
    assert committed("backlog_events", topic="orders") == 1
    report.rollback()
    assert scrape(exporter)("vacuum_held_seconds", holder="session") == 0


def test_a_lock_that_is_waited_for(exporter: Exporter, connect: Connect, orders: list[int]) -> None:
    holder, waiter = connect(autocommit=False), connect(autocommit=False)
    holder.execute("select from tidemark.topic_partitions where id = %s for no key update", (orders[0],))
    pid = waiter.info.backend_pid
    waiter.execute("set statement_timeout = '10s'")
    waiter.pgconn.send_query(b"select from tidemark.topic_partitions for no key update")

    def the_wait_is_seen() -> bool:
        waits = scrape(exporter)
        return waits("lock_waiting_sessions") == 1 and (waits("lock_wait_longest_seconds") or 0) > 0

    wait_until(the_wait_is_seen)
    holder.execute("select pg_cancel_backend(%s)", (pid,))


def test_counting_the_backlog_is_bounded(
    exporter: Exporter, conn: Connection[TupleRow], orders: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    commit(conn, "a", [orders[0]] * 30 + [orders[1], orders[3]])
    assert scrape(exporter)("backlog_count_capped") == 0
    monkeypatch.setattr(db.status, "COUNT_LIMIT_OF_ALL", 10)
    capped = scrape(exporter)
    assert capped("backlog_count_capped") == 1
    assert capped("backlog_partitions", topic="orders") == 3
    # Ten were counted; the partitions that were not reached have at least one each.
    assert capped("backlog_events", topic="orders") == 12


def read_by_figures(conn: Connection[TupleRow]) -> int:
    explained = psycopg.RawCursor(conn).execute(
        b"explain (analyze, buffers, format json) "
        + statements()["figures_topics"].replace(b"$1", b"200").replace(b"$2", b"1000").replace(b"$3", b"60")
    )
    plan = explained.fetchone()
    assert plan
    top = plan[0][0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def test_the_figures_cost_some_descents_a_partition(connect: Connect, conn: Connection[TupleRow]) -> None:
    """However long the log is, and however many transactions were open once."""
    ids = make_topic(conn, "large", partitions=2_000)
    commit(conn, "first", ids)
    materialize(conn, ids)
    conn.execute("analyze")
    before = read_by_figures(conn)
    assert before < 15 * len(ids)
    once_open = [connect(autocommit=False) for _ in range(20)]
    for other in once_open:
        other.execute("select pg_current_xact_id()")
    for n in range(10):
        commit(conn, f"more {n}", ids)
        materialize(conn, ids)
    commit(conn, "pending", [ids[7], ids[1200], ids[1999]])
    during = read_by_figures(conn)
    for n, other in enumerate(once_open):
        if n % 2:
            commit(other, f"late {n}", ids[: n + 1])
            other.commit()
        other.rollback()
    after = read_by_figures(conn)
    rows = run(conn, "figures_topics", (200, 1000, 60.0), prepare=False).fetchall()
    assert [(r[0], r[6], r[7]) for r in rows] == [("large", 22, 3 + sum(range(2, 21, 2)))]
    # A level more of the index, perhaps.
    assert max(during, after) < 1.5 * before


# --- What the workers add up


def test_figures_of_the_workers(
    app: TidemarkApp, exporter: Exporter, conn: Connection[TupleRow], orders: list[int]
) -> None:
    create_topic(conn, "payments", 1)
    commit(conn, "a", [orders[0]] * 3)
    done = drain(app, orders[:1])
    commit(conn, "b", [orders[0], *partition_ids(conn, "payments")])
    drain(app, [orders[0], *partition_ids(conn, "payments")])
    app.once(WorkerMetrics).flush()
    found = scrape(exporter)
    own = {"topic": "orders", "strategy": done.strategy}
    both = {"topic": "(several)", "strategy": done.strategy}
    other = {"topic": "payments", "strategy": done.strategy}
    # What was placed is counted for its topic, also where one transaction served two.
    assert found("materialize_events_total", **own) == 4
    assert found("materialize_events_total", **other) == 1
    assert found("materialize_records_total", **own) == 12
    assert found("materialize_log_bytes_total", **own) == 40
    assert found("materialize_transaction_bytes_total", **own) == 2 * done.transaction_size_bytes
    assert found("materialize_attempts_total") == 2
    assert found("materialize_duration_seconds_count", **own) == 1
    assert found("materialize_duration_seconds_sum", **own) == pytest.approx(done.processing_time_ms / 1000, abs=1e-5)
    assert found("materialize_duration_seconds_bucket", le="+Inf", **own) == 1
    assert found("materialize_lock_wait_seconds_count", **both) == 1
    bound = min(b for b in metrics.BUCKETS if b >= done.processing_time_ms / 1000)
    assert found("materialize_duration_seconds_bucket", le=str(bound), **own) == 1


def test_how_long_commits_wait_for_their_offsets(
    app: TidemarkApp, exporter: Exporter, conn: Connection[TupleRow], orders: list[int]
) -> None:
    """Each event of a run counts, by the time of its commit; once a second, whatever the number of transactions."""
    commit(conn, "old", [orders[0]] * 3)
    conn.execute("update tidemark.objects set committed_at = committed_at - interval '7 seconds'")
    commit(conn, "new", [orders[0]] * 2)
    drain(app, orders[:1])
    for n in range(3):
        commit(conn, f"more {n}", orders[1:2])
        drain(app, orders[1:2])
    app.once(WorkerMetrics).flush()
    found = scrape(exporter)
    assert found("commit_to_offset_seconds_count", topic="orders") == 5
    assert found("commit_to_offset_seconds_bucket", topic="orders", le="2.5") == 2
    assert found("commit_to_offset_seconds_bucket", topic="orders", le="10.0") == 5


def test_the_wait_of_commits_is_that_of_a_run_made_now(conn: Connection[TupleRow], orders: list[int]) -> None:
    for n in range(3):
        commit(conn, f"object {n}", [orders[0]] * 100)
        materialize(conn, orders[:1])
        conn.execute("update tidemark.objects set committed_at = committed_at - interval '1 hour'")
    waited = [ages_of_run(conn, orders[0], newer) for newer in range(7)]
    # Runs hold 64 events, or what is left of a transaction.
    assert [len(ages) for ages in waited] == [36, 64, 36, 64, 36, 64, 0]
    assert [{round(age / 3600) for age in ages} for ages in waited[:6]] == [{1}, {1}, {2}, {2}, {3}, {3}]


def test_a_sample_that_fails_fails_no_task(app: TidemarkApp, monkeypatch: pytest.MonkeyPatch) -> None:
    def ages_of(conn: object, partition_id: int, newer: int) -> list[float]:
        asked.append(conn)
        raise errors.ConnectionTimeout(f"while reading run {newer} of {partition_id}")

    asked: list[object] = []
    monkeypatch.setattr("tasks.drain.ages_of_run", ages_of)
    DrainMetrics(app).transaction(SIDE, DONE)
    assert len(asked) == 1


def test_failed_attempts_by_kind(app: TidemarkApp, exporter: Exporter, connect: Connect, orders: list[int]) -> None:
    holder = connect(autocommit=False)
    holder.execute("select from tidemark.topic_partitions where id = %s for no key update", (orders[0],))
    assert drain(app, orders[:1]).stuck_partition_ids == (orders[0],)
    with pytest.raises(UnknownPartitionError):
        drain(app, [2**31 - 1])
    DrainMetrics(app).failed(SIDE, ZeroDivisionError())
    app.once(WorkerMetrics).flush()
    found = scrape(exporter)
    assert found("materialize_errors_total", kind="LockNotAvailable") == 1
    assert found("materialize_stuck_total") == 1
    assert found("materialize_errors_total", kind="UnknownPartitionError") == 1
    assert found("materialize_errors_total", kind="other") == 1
    assert found("materialize_attempts_total") == 4
    assert errors.LockNotAvailable.__name__ in found.label_values("materialize_errors_total", "kind")


DONE = MaterializationMetrics(
    processing_time_ms=20.0,
    events_processed=10,
    records=20,
    log_bytes=30,
    transaction_size_bytes=40,
    transactions=1,
    moved=(Moved(partition_id=1, events=10, records=20, log_bytes=30, runs=1),),
)
SIDE = Side(strategy=DEFAULT_STRATEGY, partition_ids=[1])


def counted(app: TidemarkApp, topic: str = "orders") -> None:
    """A transaction, of one partition of this topic."""
    app.once(PartitionNames)._known[1] = (topic, 0)
    observer = DrainMetrics(app)
    # Of figures that are made up the database has no ages.
    observer._ages_due = inf
    observer.transaction(SIDE, DONE)


def worker_of(client: Redis | None, topics: int = 5) -> TidemarkApp:
    app = TidemarkApp("worker")
    app.redis = client
    app.settings = Settings(metrics_topics=topics)
    return app


def test_figures_outlast_the_exporter_and_the_workers(app: TidemarkApp) -> None:
    """Two processes add to the same figures, and a second exporter shows what the first did."""
    for _ in range(2):
        worker = worker_of(app.redis)
        counted(worker)
        worker.once(WorkerMetrics).flush()
        with Exporter(app, "127.0.0.1", 0) as exporter:
            last = scrape(exporter)
    assert last("materialize_events_total", topic="orders", strategy=DONE.strategy) == 20
    assert last("materialize_duration_seconds_count", topic="orders", strategy=DONE.strategy) == 2


def test_labels_are_bounded(make_app: MakeApp, conn: Connection[TupleRow], tmp_path: Path) -> None:
    names = [f"topic{n}" for n in range(6)]
    for name in names:
        create_topic(conn, name, 2)
        commit(conn, name, partition_ids(conn, name))
    with ExitStack() as stack:
        app = make_app(**SETTINGS, data_dir=tmp_path, metrics_topics=3)
        exporter = stack.enter_context(Exporter(app, "127.0.0.1", 0))
        for _ in range(2):
            # As many processes, each of which meets all topics.
            worker = worker_of(app.redis, topics=3)
            for name in names:
                counted(worker, name)
            worker.once(WorkerMetrics).flush()
        found = scrape(exporter)
    shown = {*names[:3], "(other)"}
    assert found.label_values("backlog_events", "topic") == shown
    assert found("backlog_events", topic="(other)") == 6
    assert found("partitions", topic="(other)") == 6
    assert found("topics") == 6
    topics = found.label_values("materialize_events_total", "topic")
    assert len(topics) == 4
    assert "(other)" in topics
    assert found("materialize_events_total", topic="(other)", strategy=DONE.strategy) == 60
    counts = [v for (n, _), v in found.values.items() if n == "tidemark_materialize_events_total"]
    assert sum(counts) == 120


def test_a_forked_child_does_not_send_its_parents_figures(app: TidemarkApp) -> None:
    worker = worker_of(app.redis).once(WorkerMetrics)
    worker.add("materialize_attempts")
    worker._lock.acquire()
    worker._pid = os.getpid() + 1
    worker.add("sweep_partitions", amount=4)
    worker.flush()
    assert app.redis
    assert metrics.read(app.redis) == {"sweep_partitions": "4"}


def test_figures_wait_for_a_redis_that_is_away(
    crashable: RedisServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Redis.from_url(crashable.url, decode_responses=True, socket_connect_timeout=1)
    app = worker_of(client)
    worker = app.once(WorkerMetrics)
    crashable.kill()
    counted(app)
    worker.flush()
    assert "Redis does not answer" in caplog.text
    caplog.clear()
    # Within the pause nobody waits for it again.
    counted(app)
    worker.flush()
    assert caplog.text == ""
    crashable.restart()
    worker._hints._silent_until = 0.0
    worker.flush()
    assert metrics.read(client)[f"materialize_events|orders|{DONE.strategy}"] == "20"
    client.close()


@pytest.fixture
def crashable(server_directory: Path, redis_binary: Path | None) -> Iterator[RedisServer]:
    with RedisServer(server_directory / "redis-of-figures", binary=redis_binary).start() as server:
        yield server


def test_figures_of_other_tasks(app: TidemarkApp, exporter: Exporter) -> None:
    worker = app.once(WorkerMetrics)
    worker.task_ended("tasks.fan_out", "SUCCESS", 0.5, {"commits": 3, "partitions": 2, "tasks": 1})
    worker.task_ended("tasks.sweep", "SUCCESS", 0.5, {"partitions": 5, "tasks": 2})
    worker.task_ended("tasks.retain", "SUCCESS", 0.5, {"deleted": 4, "log_bytes": 50})
    worker.task_ended("tasks.audit", "SUCCESS", 0.5, {"violations": 2, "complete": True})
    worker.task_ended("tasks.audit", "SUCCESS", 0.5, {"violations": 0, "complete": True})
    worker.task_ended("tasks.audit", "FAILURE", 0.25, ValueError("violations"))
    worker.task_ended("tasks.collect", "SUCCESS", 0.5, {"deleted": 7, "failed": 1})
    worker.task_ended("tasks.reconcile", "SUCCESS", 0.5, {"compared": 9, "condemned": 3, "missing": 2, "first": ["k"]})
    worker.flush()
    found = scrape(exporter)
    assert found("task_runs_total", task="tasks.audit", outcome="success") == 2
    assert found("task_runs_total", task="tasks.audit", outcome="failure") == 1
    assert found("task_seconds_total", task="tasks.audit") == 1.25
    assert time.time() - (found("task_last_success_timestamp_seconds", task="tasks.fan_out") or 0) < 10
    assert found("fan_out_commits_total") == 3
    assert found("fan_out_tasks_total", by="fan_out") == 1
    assert found("fan_out_tasks_total", by="sweep") == 2
    assert found("sweep_partitions_total") == 5
    assert (found("retention_batches_total"), found("retention_log_bytes_total")) == (4, 50)
    assert (found("collect_objects_total"), found("collect_failures_total")) == (7, 1)
    assert (found("reconcile_objects_total"), found("reconcile_condemned_total")) == (9, 3)
    assert found("reconcile_missing_total") == 2
    assert (found("audit_violations_total"), found("audit_last_violations")) == (2, 0)
    assert time.time() - (found("audit_last_timestamp_seconds") or 0) < 10


def test_workers_that_are_heard_of_and_those_that_went(exporter: Exporter) -> None:
    """One that is killed and started again under its name is the same; one that is gone for good leaves no series."""
    for name in ("celery@a", "celery@5eb63bbb", "celery@c3fcd3d7"):
        exporter._broker._heard({"hostname": name, "active": 1, "processed": 7})
    workers = exporter._broker._workers
    for name in ("celery@a", "celery@5eb63bbb"):
        workers[name] = (workers[name][0] - 90, workers[name][1])
    killed = scrape(exporter)
    assert killed("workers") == 1
    assert killed.label_values("worker_heartbeat_timestamp_seconds", "worker") == {
        "celery@a", "celery@5eb63bbb", "celery@c3fcd3d7",
    }  # fmt: skip
    exporter._broker._heard({"hostname": "celery@a"})
    workers["celery@5eb63bbb"] = (workers["celery@5eb63bbb"][0] - 900, {})
    later = scrape(exporter)
    assert later("workers") == 2
    assert later.label_values("worker_heartbeat_timestamp_seconds", "worker") == {"celery@a", "celery@c3fcd3d7"}
    exporter._broker._gone({"hostname": "celery@c3fcd3d7"})
    assert scrape(exporter).label_values("worker_tasks_total", "worker") == {"celery@a"}


def test_leases(app: TidemarkApp, exporter: Exporter) -> None:
    assert app.redis
    nobody = scrape(exporter)
    assert (nobody("shards"), nobody("lease_members"), nobody("leased_shards")) == (8, 0, 0)
    membership = app.once(Membership)
    membership.enter("w@host", program="worker", pid=1, slots=1, leases=True)
    membership.renew(consumes=tuple(range(7)))
    one = scrape(exporter)
    assert (one("shards"), one("lease_members"), one("leased_shards")) == (8, 1, 7)
    assert one("beat_last_tick_timestamp_seconds") is None
    beat = Membership(app)
    beat.enter("beat@host", program="beat", pid=2)
    beat.renew()
    assert time.time() - (scrape(exporter)("beat_last_tick_timestamp_seconds") or 0) < 10


# --- When servers are away


def test_a_source_that_is_away_takes_no_other_with_it(
    monkeypatch: pytest.MonkeyPatch, make_app: MakeApp, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        monkeypatch.setattr("tasks.exporter._ANSWER_SECONDS", 0.5)
        app = make_app(**SETTINGS, data_dir=tmp_path, database_url="postgresql://127.0.0.1:1/nowhere")
        exporter = stack.enter_context(Exporter(app, "127.0.0.1", 0))
        found = scrape(exporter)
        assert found("exporter_source_up", source="postgres") == 0
        assert found("exporter_source_up", source="redis") == 1
        assert found("lag_seconds", topic="orders") is None
        assert found("materialize_attempts_total") == 0
        assert exporter.answers()


def test_redis_and_broker_away(
    make_app: MakeApp, tmp_path: Path, conn: Connection[TupleRow], orders: list[int]
) -> None:
    with ExitStack() as stack:
        app = make_app(**SETTINGS, data_dir=tmp_path, broker_url="redis://127.0.0.1:1/0")
        exporter = stack.enter_context(Exporter(app, "127.0.0.1", 0))

        def all_but_postgres_are_down() -> bool:
            found = scrape(exporter)
            up = [found("exporter_source_up", source=s) for s in ("postgres", "redis", "broker")]
            return up == [1, 0, 0] and found("partitions", topic="orders") == 4

        wait_until(all_but_postgres_are_down)


def test_a_scrape_of_hung_servers_ends_in_time(
    make_app: MakeApp, postgres_server: PostgresServer, crashable: RedisServer, tmp_path: Path
) -> None:
    """Well before Prometheus gives it up after 10 s, so that the alert is that of the source, and of nothing else."""
    with ExitStack() as stack:
        app = make_app(**SETTINGS, broker_url=crashable.url, data_dir=tmp_path)
        connected = stack.enter_context(Exporter(app, "127.0.0.1", 0))
        connected._broker._heard({"hostname": "celery@test"})
        sources = ("postgres", "redis", "broker")

        def all_are_up() -> bool:
            found = scrape(connected)
            return [found("exporter_source_up", source=s) for s in sources] == [1, 1, 1] and found("workers") == 1

        wait_until(all_are_up)
        with frozen(postgres_server.pid, crashable.pid):
            late = stack.enter_context(Exporter(app, "127.0.0.1", 0))
            with ThreadPoolExecutor(2) as prometheus:
                began = time.monotonic()
                found = list(prometheus.map(scrape, (connected, late)))
                assert time.monotonic() - began < 4
            for exporter, answer in zip((connected, late), found, strict=True):
                assert [answer("exporter_source_up", source=s) for s in sources] == [0, 0, 0]
                # Neither 0 workers nor a worker that is silent.
                assert not any(name.startswith("tidemark_worker") for name, _ in answer.values)
                assert exporter.answers()
        wait_until(all_are_up)


def test_a_source_is_not_asked_too_often() -> None:
    asked = []

    def slow() -> list[Metric]:
        asked.append(time.monotonic())
        time.sleep(0.05)
        return []

    source = Source("slow", slow, seconds=0.01)
    until = time.monotonic() + 0.6
    while time.monotonic() < until:
        source.ask()
        source.reading(until)
    # A tenth of the time, so no more than two or so.
    assert 1 <= len(asked) <= 3


def test_a_source_that_hung_is_asked_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not after nine times as long as it hung."""
    monkeypatch.setattr("tasks.exporter._ANSWER_SECONDS", 0.05)
    asked = []

    def hangs_once() -> list[Metric]:
        asked.append(True)
        time.sleep(0.5 if len(asked) == 1 else 0)
        return []

    source = Source("hung", hangs_once, seconds=0.01)
    source.ask()
    assert source.reading(time.monotonic() + 0.05).error == "it hangs"

    def it_is_asked_again() -> bool:
        source.ask()
        return len(asked) == 2

    wait_until(it_is_asked_again, timeout=2.5)


def test_where_it_cannot_listen(app: TidemarkApp, exporter: Exporter) -> None:
    with pytest.raises(TidemarkError, match=f"cannot listen on 127.0.0.1 port {exporter.port}"):
        Exporter(app, "127.0.0.1", exporter.port)


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_it_listens_on_either_kind_of_address_and_stops(app: TidemarkApp, address: str) -> None:
    if address == "::1" and not Path("/proc/net/if_inet6").read_text("ascii").strip():
        pytest.skip("this machine has no IPv6")
    with Exporter(app, address, 0) as exporter:
        assert exporter.url.startswith(f"http://{'[::1]' if ':' in address else address}:{exporter.port}/")
        # Every page is the metrics.
        assert all("tidemark_build_info" in get(exporter, path) for path in ("metrics", "", "health"))
        assert exporter.answers()
    assert not exporter.answers()


def test_a_server_that_does_not_answer_is_noticed(exporter: Exporter) -> None:
    """The heartbeat goes by it; the sources have no part in it."""
    assert exporter.answers()
    exporter._server.shutdown()
    assert not exporter.answers()


# --- Form


@pytest.fixture
def full(app: TidemarkApp, exporter: Exporter, conn: Connection[TupleRow], orders: list[int]) -> Scrape:
    """An answer with a sample of every metric."""
    commit(conn, "a", orders)
    materialize(conn, orders)
    audit(conn)
    counted(app)
    app.once(WorkerMetrics).task_ended("tasks.audit", "SUCCESS", 0.1, {"violations": 0})
    app.once(WorkerMetrics).observe("commit_to_offset_seconds", 0.1, "orders")
    for family in metrics.FAMILIES:
        if family.kind == "counter":
            app.once(WorkerMetrics).add(family.name, *family.labels)
    app.once(WorkerMetrics).flush()
    exporter._broker._heard({"hostname": "celery@test"})
    app.once(Membership).enter("beat@test", program="beat", pid=1)
    app.once(Membership).renew()
    return scrape(exporter)


def test_names_and_units(full: Scrape) -> None:
    for family in full.families:
        name = family.name
        assert re.fullmatch(r"tidemark_[a-z_]+", name)
        assert family.documentation.endswith(".")
        assert not name.endswith(("_total", "_count", "_ms", "_milliseconds", "_kb"))
        assert all(s.name.endswith("_total") for s in family.samples) == (family.type == "counter")
    units = [f.name for f in full.families if "second" in f.name or "byte" in f.name]
    assert all(re.search(r"_(seconds|bytes)(_total)?$", name) for name in units)


def test_promtool_finds_nothing(full: Scrape) -> None:
    if PROMTOOL is None:
        pytest.skip(WITHOUT_PROMTOOL)
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=full.text, capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


PROMETHEUS = ROOT / "config/prometheus"
# What Prometheus itself makes, and what a metric's name is made of besides.
_METRIC = re.compile(r"\btidemark_[a-z_]+\b")


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((ROOT / "config/grafana/dashboard.json").read_text("utf-8"))
    return loaded


def panels() -> list[dict[str, Any]]:
    """Those of collapsed rows as well."""
    return [inner for panel in dashboard()["panels"] for inner in (panel, *panel.get("panels", ()))]


def expressions() -> list[str]:
    variables = {"$__rate_interval": "1m", "$topic": ".*", "$installation": "exporter:9890"}
    found = [target["expr"] for panel in panels() for target in panel.get("targets", ())]
    for variable, value in variables.items():
        found = [expression.replace(variable, value) for expression in found]
    return found


def anchors() -> set[str]:
    """Of the sections of the runbook."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / "docs/operations.md").read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_metric_of_dashboard_and_alerts_exists(full: Scrape) -> None:
    there = {name for name, _ in full.values}
    alerts = (PROMETHEUS / "alerts.yml").read_text("utf-8")
    asked = {
        name
        for text in (*expressions(), *re.findall(r"expr: (?:>-\n)?((?:.*\n)+?) +(?:for|labels):", alerts))
        for name in _METRIC.findall(text)
    }
    assert len(asked) > 40
    assert asked <= there, asked - there
    definitions = dashboard()["templating"]["list"]
    assert set(_METRIC.findall(json.dumps(definitions))) <= there


def test_every_expression_of_the_dashboard_parses(tmp_path: Path) -> None:
    if PROMTOOL is None:
        pytest.skip(WITHOUT_PROMTOOL)
    rules = [{"record": f"panel:number{n}", "expr": expression} for n, expression in enumerate(expressions())]
    file = tmp_path / "rules.yml"
    # JSON is YAML.
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}), "utf-8")
    done = subprocess.run([PROMTOOL, "check", "rules", file], capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    x, y, w, h = (panel["gridPos"][name] for name in "xywh")
    return {(x + i, y + j) for i in range(w) for j in range(h)}


def test_the_dashboard_is_well_laid_out() -> None:
    """Nothing lies on anything else: neither what is open, nor what a row shows when it is opened."""
    top = dashboard()["panels"]
    for together in (top, *(panel["panels"] for panel in top if panel["type"] == "row")):
        taken: set[tuple[int, int]] = set()
        for panel in together:
            assert not taken & cells(panel), panel["title"]
            taken |= cells(panel)
        assert all(x < 24 for x, _ in taken)
    assert len({panel["id"] for panel in panels()}) == len(panels())
    rows = [panel for panel in top if panel["type"] == "row"]
    # What one looks at first is open, all other rows are not.
    assert [row["collapsed"] for row in rows] == [False] + [True] * (len(rows) - 1)
    assert all(bool(row["panels"]) == row["collapsed"] for row in rows)
    for panel in panels():
        if panel["type"] != "row":
            assert panel["description"].endswith("."), panel["title"]
            assert bool(panel.get("targets")) == (panel["type"] != "alertlist")


def unit_of(expression: str) -> str:
    """What an expression of the dashboard counts in, by the names of its metrics."""
    name = _METRIC.findall(expression)[0]
    if name.endswith("_seconds_total"):
        # Seconds a second.
        return "short"
    if "_bytes" in name:
        return "Bps" if "rate(" in expression else "bytes"
    seconds = re.search(r"_seconds(_bucket)?$", name) and not expression.startswith("sum by (le)")
    return "s" if seconds else "short"


def test_no_axis_has_two_units() -> None:
    for panel in panels():
        if panel["type"] in {"timeseries", "stat"}:
            units = {unit_of(target["expr"]) for target in panel["targets"]}
            assert units == {panel["fieldConfig"]["defaults"]["unit"]}, panel["title"]
            assert panel["fieldConfig"]["overrides"] == []


def test_the_dashboard_shows_one_installation_and_leads_to_runbook_and_flower() -> None:
    found = dashboard()
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert variables == {"datasource", "installation", "topic", "docs", "flower"}
    for expression in (target["expr"] for panel in panels() for target in panel.get("targets", ())):
        assert len(_METRIC.findall(expression)) == expression.count('instance="$installation"'), expression
    assert {link["url"] for link in found["links"]} == {"${docs}operations.md#alerts", "${flower}"}
    links = [link["url"] for panel in panels() for link in panel.get("links", ())]
    assert {url.removeprefix("${docs}operations.md#") for url in links} <= anchors()
    assert len(links) > 15


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=" ".join,
)
def test_promtool_accepts_the_configuration(arguments: Sequence[str]) -> None:
    if PROMTOOL is None:
        pytest.skip(WITHOUT_PROMTOOL)
    done = subprocess.run(
        [PROMTOOL, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_its_runbook_and_a_test() -> None:
    alerts = (PROMETHEUS / "alerts.yml").read_text("utf-8")
    names = re.findall(r"- alert: (\w+)", alerts)
    assert len(names) == len(set(names)) > 8
    for key in ("summary: ", "description: ", r'runbook_url: "\{\{ \$externalLabels\.docs \}\}operations\.md#[a-z-]+"'):
        assert len(re.findall(key, alerts)) == len(names)
    tests = (PROMETHEUS / "alerts_test.yml").read_text("utf-8")
    for name in names:
        assert re.search(rf"alertname: {name}\n\s+exp_alerts", tests), f"{name} is never seen firing"
        assert re.search(rf"alertname: {name}}}", tests), f"{name} is never seen silent"


def test_the_figures_cost_little(app: TidemarkApp) -> None:
    """CPU of a task's figures, in round trips to Redis: in turns, and the least of each, which no other load raises."""
    worker, client = app.once(WorkerMetrics), app.redis
    assert client

    def cpu_of(work: Callable[[], object]) -> float:
        work()
        began = time.process_time()
        for _ in range(30):
            work()
        return time.process_time() - began

    def figures_of_a_task() -> None:
        counted(app)
        worker.task_ended("tasks.materialize", "SUCCESS", 0.02, {})
        worker.flush()

    figures, pings = zip(*((cpu_of(figures_of_a_task), cpu_of(client.ping)) for _ in range(10)), strict=True)
    assert min(figures) < 10 * min(pings)
