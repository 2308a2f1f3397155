"""Real programs against real servers: pytest-celery's fixtures, over local processes.

`celery_setup` is one worker for all queues. Tests that want several, or others, ask `start` for them. Every test has a
database of its own and an empty broker; every program ends with the test, whatever became of it.
"""

import itertools
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import celery
import psycopg
import pytest
from kombu import pools
from psycopg import Connection
from psycopg.rows import TupleRow
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestSetup,
    CeleryWorkerCluster,
    RedisTestBackend,
    RedisTestBroker,
)

from db.topics import create_topic, partition_ids
from tasks.app import TidemarkApp
from tests.acceptance.nodes import LocalRedis, LocalWorker, ProcessContainer, Worker
from tests.acceptance.producers import Producers
from tests.demo import programs
from tests.demo.check import check
from tests.demo.evidence import backlog, collect
from tests.demo.ledger import Ledger
from tests.demo.programs import FAST, Process, celery_argv, leaks
from tests.servers import PostgresServer, RedisServer
from tests.support import wait_until, with_password
from tests.support_commands import new_app

# pytest looks for fixtures in pytest-celery's modules, too. Some hold shared tasks, and the first look at one
# configures the current app: that of `tasks` would start embedded servers in this machine's own data directory.
celery.Celery("tests").set_current()

READY_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """The servers one test runs on, and the environment that leads Tidemark's programs to them."""

    database_url: str
    broker_url: str
    directory: Path
    redis_url: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        env = {
            **FAST,
            "TIDEMARK_DATABASE_URL": with_password(self.database_url),
            "TIDEMARK_BROKER_URL": self.broker_url,
            **self.settings,
        }
        return env if self.redis_url is None else {**env, "TIDEMARK_REDIS_URL": self.redis_url}


class Programs(programs.Programs):
    """Starts Tidemark's programs and ends them all. What any of them has written is looked through for secrets."""

    def __init__(self, place: Place, app: TidemarkApp) -> None:
        super().__init__(place.directory, place.env)
        self.place = place
        self.app = app
        self._numbers = itertools.count(1)

    def worker(
        self, *options: str, env: Mapping[str, str] | None = None, app: str = "tasks", wait: bool = True
    ) -> Worker:
        """A worker process; when this returns it consumes, unless `wait` is false."""
        name = f"worker{next(self._numbers)}"
        hostname = f"{name}@test"
        argv = celery_argv("worker", "-n", hostname, "-l", "INFO", *options, app=app)
        container = LocalWorker(ProcessContainer(self.process(name, argv, env), name))
        worker = Worker(container, self.app, hostname)
        if wait:
            self.ready(worker)
        return worker

    def ready(self, *workers: Worker) -> None:
        for worker in workers:

            def the_worker_is_ready(worker: Worker = worker) -> bool:
                assert worker.process.running, worker.logs()
                return " ready." in worker.logs()

            wait_until(the_worker_is_ready, timeout=READY_SECONDS)

    def beat(self) -> Process:
        return self.celery(f"beat{next(self._numbers)}", "beat", "-l", "INFO")

    def stats(self, worker: Worker) -> dict[str, int]:
        """Tasks this worker has taken so far, by name."""
        replies = self.app.control.inspect([worker.hostname()], timeout=5, limit=1).stats() or {}
        return {str(name): int(count) for name, count in replies[worker.hostname()]["total"].items()}

    def require_discreet(self) -> None:
        """Raise LeakError where one of them has written a password of the environment of any."""
        self.stop()
        environments = [self.env, *(program.env for program in self._programs)]
        if found := leaks(self.outputs(), {secret for env in environments for secret in secrets_of(env)}):
            raise LeakError("secrets stand in the output after:\n" + "\n".join(found))

    def close(self) -> None:
        self.stop()
        # pytest shows it when the test has failed.
        for name, output in self.outputs():
            print(f"=== {name}\n{output[-4000:]}")  # noqa: T201


class LeakError(AssertionError):
    """A program has written a secret."""


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Every test of real programs fails where one of them has written a secret."""
    result = yield
    if isinstance(started := pyfuncitem.funcargs.get("start"), Programs):
        started.require_discreet()
    return result


def secrets_of(env: Mapping[str, str]) -> set[str]:
    """Passwords of the URLs and of the logins in an environment."""
    urls = [urlsplit(value) for name, value in env.items() if name.endswith("_URL")]
    # RabbitMQ's own login is guest:guest, and the name is no secret.
    found = {url.password for url in urls if url.password != url.username}
    found |= {env[name].partition(":")[2] for name in ("TIDEMARK_FLOWER_AUTH", "FLOWER_BASIC_AUTH") if name in env}
    return {secret for secret in found if secret}


def make_app(place: Place) -> TidemarkApp:
    """An app in this process with settings of its own: the one in `tasks` reads its environment once."""
    values = {name.removeprefix("TIDEMARK_").lower(): value for name, value in place.env.items()}
    return new_app(**values)


@pytest.fixture
def place(database_url: str, celery_broker_cluster: CeleryBrokerCluster, redis_url: str, tmp_path: Path) -> Place:
    """Override it to run on other servers; `celery_setup`, `app` and `start` follow."""
    return Place(database_url=database_url, broker_url=celery_broker_cluster[0].config()["url"], directory=tmp_path)


@pytest.fixture
def app(place: Place) -> Iterator[TidemarkApp]:
    app = make_app(place)
    yield app
    app.database.close()
    if app.redis is not None:
        app.redis.close()
    if app.redis_url is not None:
        app.backend.result_consumer.stop()
        app.backend.client.connection_pool.disconnect()
    app.close()
    # Kombu's pools belong to the process, one for each URL.
    pools.reset()


@pytest.fixture
def start(place: Place, app: TidemarkApp) -> Iterator[Programs]:
    started = Programs(place, app)
    yield started
    started.close()


# pytest-celery's fixtures, each for the local counterpart of what it would start in Docker.


@pytest.fixture
def celery_broker_cluster(redis_server: RedisServer, redis_url: str) -> CeleryBrokerCluster:
    return CeleryBrokerCluster(RedisTestBroker(LocalRedis(redis_server, redis_url)))


@pytest.fixture
def celery_backend_cluster(redis_server: RedisServer, redis_url: str) -> CeleryBackendCluster:
    return CeleryBackendCluster(RedisTestBackend(LocalRedis(redis_server, redis_url)))


@pytest.fixture
def celery_worker(start: Programs) -> Worker:
    return start.worker()


@pytest.fixture
def celery_worker_cluster(celery_worker: Worker) -> CeleryWorkerCluster:
    return CeleryWorkerCluster(celery_worker)


@pytest.fixture
def celery_setup_app(app: TidemarkApp) -> TidemarkApp:
    return app


@pytest.fixture
def celery_setup(
    celery_worker_cluster: CeleryWorkerCluster,
    celery_broker_cluster: CeleryBrokerCluster,
    celery_backend_cluster: CeleryBackendCluster,
    celery_setup_app: TidemarkApp,
) -> CeleryTestSetup:
    """As pytest-celery's, whose ready check reads Docker's logs."""
    return CeleryTestSetup(
        worker_cluster=celery_worker_cluster,
        broker_cluster=celery_broker_cluster,
        backend_cluster=celery_backend_cluster,
        app=celery_setup_app,
    )


# Servers that a test may crash.


@pytest.fixture(scope="session")
def crashable_postgres(server_directory: Path, postgres_bin: Path | None) -> Iterator[PostgresServer]:
    # With fsync and full page writes: a crash must lose nothing.
    with PostgresServer(server_directory / "crashable-postgres", bin_dir=postgres_bin).start() as server:
        yield server


@pytest.fixture
def crashable_redis(server_directory: Path, redis_binary: Path | None) -> Iterator[RedisServer]:
    with RedisServer(server_directory / "crashable-redis", binary=redis_binary).start() as server:
        yield server


@dataclass(frozen=True, kw_only=True)
class Log:
    """The log under test: a connection of the test's own, its topic's partitions and what producers wrote down."""

    url: str
    conn: Connection[TupleRow]
    partitions: list[int]
    ledger: Ledger

    def backlog(self) -> int:
        return backlog(self.conn)

    def wait_until_drained(self, timeout: float = 60) -> None:
        def the_backlog_is_drained() -> bool:
            return self.backlog() == 0

        wait_until(the_backlog_is_drained, timeout=timeout, interval=0.1)

    def check(self) -> int:
        """Every invariant holds; returns how many batches have their offsets."""
        evidence = collect(self.conn, self.partitions, self.ledger)
        assert [finding for finding in check(evidence) if finding.violation is not None] == []
        return evidence.placed


@pytest.fixture
def log(place: Place) -> Iterator[Log]:
    conn = psycopg.connect(place.database_url, autocommit=True)
    create_topic(conn, "orders", 8)
    yield Log(url=place.database_url, conn=conn, partitions=partition_ids(conn, "orders"), ledger=Ledger())
    conn.close()


@pytest.fixture
def produce(log: Log) -> Iterator[Callable[..., Producers]]:
    """Starts producers in the background; they stop with the test."""
    with ExitStack() as stack:

        def begin(**options: Any) -> Producers:
            producers = Producers(log.url, log.partitions, log.ledger, **options)
            stack.callback(producers.stop)
            return producers

        yield begin
