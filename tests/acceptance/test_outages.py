"""Servers crash while tasks run; the same worker processes go on when they are back, and nothing is lost."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from psycopg_pool import PoolTimeout

from config.settings import Settings
from db.migrate import upgrade
from db.pool import Database
from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Place, Programs
from tests.acceptance.nodes import Worker
from tests.acceptance.producers import Producers, commit_one
from tests.servers import PostgresServer, RedisServer
from tests.support import wait_until

# One worker per kind of pool, each with shards of its own (partition id modulo 4).
POOLS = {
    "prefork": "materialize.0,control,maintenance",
    "threads": "materialize.1",
    "solo": "materialize.2,materialize.3",
}


@pytest.fixture
def place(crashable_postgres: PostgresServer, crashable_redis: RedisServer, tmp_path: Path) -> Iterator[Place]:
    name = f"test_{uuid4().hex[:12]}"
    with psycopg.connect(crashable_postgres.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    upgrade(crashable_postgres.url(name))
    yield Place(
        database_url=crashable_postgres.url(name),
        broker_url=crashable_redis.url,
        directory=tmp_path,
        settings={"TIDEMARK_QUEUED_SECONDS": "1"},
    )
    with psycopg.connect(crashable_postgres.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def start_workers(start: Programs, app: str = "tasks", pools: tuple[str, ...] = tuple(POOLS)) -> list[Worker]:
    workers = [
        start.worker("-P", pool, "-c", "2" if pool == "prefork" else "1", "-Q", POOLS[pool], app=app, wait=False)
        for pool in pools
    ]
    start.ready(*workers)
    return workers


def assert_alive(workers: list[Worker]) -> None:
    for worker in workers:
        assert worker.process.running, f"{worker.hostname()} is gone:\n{worker.logs()[-3000:]}"


@contextmanager
def tasks_in_flight(app: TidemarkApp, log: Log, partitions: list[int]) -> Iterator[None]:
    """One materialize task for each partition runs, and cannot end before the block does."""
    name = f"holder-{uuid4().hex[:8]}"
    with psycopg.connect(log.url, application_name=name) as holder:
        holder.execute("select from tidemark.topic_partitions where id = any(%s) for update", (partitions,))
        for partition in partitions:
            app.send_task("tasks.materialize", kwargs={"partition_ids": [partition]})

        def all_tasks_wait_for_the_lock() -> bool:
            row = log.conn.execute(
                "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
            ).fetchone()
            return row == (len(partitions),)

        wait_until(all_tasks_wait_for_the_lock)
        yield
        holder.rollback()


def partitions_of(log: Log, shards: tuple[int, ...]) -> list[int]:
    """One partition of each of these shards."""
    return [next(p for p in log.partitions if p % 4 == shard) for shard in shards]


def test_postgres_crashes_while_tasks_run(
    start: Programs, place: Place, log: Log, produce: Callable[..., Producers], crashable_postgres: PostgresServer
) -> None:
    """Twice, once for longer: every kind of pool goes on with the same process; failed commits are replayed."""
    workers = start_workers(start)
    start.beat()
    producers = produce()
    for pause in (0.0, 3.0):
        mark = len(log.ledger.sent)

        def more_is_committed(mark: int = mark) -> bool:
            return len(log.ledger.sent) > mark + 100

        wait_until(more_is_committed, timeout=20)
        crashable_postgres.kill()
        time.sleep(pause)
        crashable_postgres.restart()
    mark = len(log.ledger.sent)
    wait_until(more_is_committed, timeout=20)
    producers.stop()
    with psycopg.connect(place.database_url, autocommit=True) as conn:
        fresh = Log(url=log.url, conn=conn, partitions=log.partitions, ledger=log.ledger)
        fresh.wait_until_drained()
        assert fresh.check() == len(log.ledger.sent)
    assert_alive(workers)


def test_redis_crashes_while_tasks_run(
    start: Programs, app: TidemarkApp, log: Log, crashable_redis: RedisServer
) -> None:
    """Every kind of pool has a task in flight which it acknowledges late: the worker goes on with the same process."""
    workers = start_workers(start)
    commit_one(log.conn, log.ledger, "bucket/before", log.partitions)
    with tasks_in_flight(app, log, partitions_of(log, (0, 1, 2))):
        crashable_redis.kill()
        # Long enough for every consumer to find out and to fail to connect.
        time.sleep(1.5)
        assert_alive(workers)
        commit_one(log.conn, log.ledger, "bucket/meanwhile", log.partitions)
        crashable_redis.restart()
    start.beat()
    commit_one(log.conn, log.ledger, "bucket/after", log.partitions)
    log.wait_until_drained()
    log.check()
    assert_alive(workers)


@pytest.mark.upstream
def test_celery_alone_does_not_survive_a_crash_of_redis(
    start: Programs, app: TidemarkApp, log: Log, crashable_redis: RedisServer
) -> None:
    """The same without tasks/recovery.py. When this fails, Celery has learned it: delete that module and this test.

    It takes a moment's bad luck, so several crashes, until the worker ends.
    """
    (worker,) = start_workers(start, app="tests.acceptance.unmended", pools=("prefork",))

    def the_worker_is_gone() -> bool:
        return not worker.process.running

    for number in range(6):
        commit_one(log.conn, log.ledger, f"bucket/{number}", log.partitions)
        # A worker that ends in the middle of it leaves the tasks alone.
        with suppress(AssertionError), tasks_in_flight(app, log, partitions_of(log, (0,))):
            crashable_redis.kill()
            time.sleep(1.5)
            crashable_redis.restart()
        with suppress(AssertionError):
            wait_until(the_worker_is_gone, timeout=3)
            break
    assert the_worker_is_gone(), "tasks/recovery.py can go"
    assert "AttributeError: 'NoneType' object has no attribute" in worker.logs()


IDLE = 10


@pytest.fixture
def database(place: Place) -> Iterator[Database]:
    """A pool that holds ten idle connections."""
    settings = Settings(database_url=place.database_url, pool_wait=20)
    database = Database(place.database_url, settings, threads=IDLE)
    with ExitStack() as stack:
        for _ in range(IDLE):
            stack.enter_context(database.connection())
    yield database
    database.close()


@pytest.mark.parametrize("seconds", [0, 2.5])
def test_the_pool_is_back_as_soon_as_postgres_is(
    database: Database, crashable_postgres: PostgresServer, seconds: float
) -> None:
    """With ten dead connections in it, and with a caller that waits all the time the server is down."""
    back: list[float] = []

    def come_back() -> None:
        time.sleep(seconds)
        crashable_postgres.restart()
        back.append(time.monotonic())

    crashable_postgres.kill()
    restarting = threading.Thread(target=come_back)
    restarting.start()
    if seconds == 0:
        restarting.join()
    with database.connection() as conn:
        assert conn.execute("select 1").fetchone() == (1,)
    restarting.join()
    assert time.monotonic() - back[0] < 2


def test_the_pool_survives_a_database_that_is_dropped_and_created_again(
    database: Database, place: Place, crashable_postgres: PostgresServer
) -> None:
    name = sql.Identifier(str(conninfo_to_dict(place.database_url)["dbname"]))
    with psycopg.connect(crashable_postgres.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("drop database {} with (force)").format(name))
        admin.execute(sql.SQL("create database {}").format(name))
    began = time.monotonic()
    with database.connection() as conn:
        assert conn.execute("select 1").fetchone() == (1,)
    assert time.monotonic() - began < 2


def test_the_pool_gives_up_in_time(place: Place, crashable_postgres: PostgresServer) -> None:
    """A server that stays away is an error after `pool_wait`, which says what may be the matter."""
    settings = Settings(database_url=place.database_url, pool_wait=1.5)
    database = Database(place.database_url, settings, threads=1)
    crashable_postgres.kill()
    began = time.monotonic()
    with pytest.raises(PoolTimeout, match=r"no connection within 1\.5 s"), database.connection():
        pass
    assert 1.4 < time.monotonic() - began < 3
    crashable_postgres.restart()
    with database.connection():
        pass
    database.close()
