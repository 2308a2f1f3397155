"""The running system that faults are done to: servers behind proxies, programs, producers and readers that never stop.

Everything goes into one history, and the history check has the last word. Programs are started again when they end, as
a supervisor does.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import TupleRow

from config.settings import Settings
from db.audit import audit
from db.migrate import upgrade
from db.pool import Database
from db.topics import create_topic, partition_ids
from tests.demo.check import Finding, check
from tests.demo.evidence import backlog, collect
from tests.demo.figures import Meter
from tests.demo.ledger import Ledger, LedgerTail, ask_noted
from tests.demo.observers import Reader, Watcher
from tests.demo.producer import Order, Outage, Shift, commit_everywhere
from tests.demo.programs import FAST, DemoError, Process, Programs, celery_argv
from tests.faults.proxy import Address, Proxy
from tests.servers import PostgresServer, RedisServer

PREFIX = "faults/"
SHARDS = 4
# Of a partition: some minutes of load.
RETENTION_BYTES = 2_000_000
_TICK = 0.02
_RECOVER_SECONDS = 120.0
_STOP_SECONDS = 10.0
_SETTINGS = {
    **FAST,
    "TIDEMARK_SHARDS": str(SHARDS),
    "TIDEMARK_LOCK_TIMEOUT": "1",
    "TIDEMARK_LEASE_SECONDS": "3",
    "TIDEMARK_RETENTION_INTERVAL": "2",
    "TIDEMARK_AUDIT_INTERVAL": "3",
    "TIDEMARK_COLLECT_INTERVAL": "2",
    "TIDEMARK_RECONCILE_INTERVAL": "5",
    # Longer than a producer repeats a commit through all of these faults.
    "TIDEMARK_OBJECT_GRACE_SECONDS": "180",
    "TIDEMARK_OBJECT_TTL_SECONDS": "1200",
}


class World:
    """`chance` draws everything that a fault leaves open, so a seed repeats it as far as the scheduler lets it."""

    def __init__(
        self,
        directory: Path,
        stack: ExitStack,
        *,
        seed: int,
        workers: int = 3,
        producers: int = 2,
        rate: float = 4.0,
        disk: Path | None = None,
        long: float = 8.0,
    ) -> None:
        self.directory = directory
        self.stack = stack
        # Where Postgres keeps its data.
        self.disk = disk or directory
        self.chance = random.Random(seed)
        self._rate = rate
        self.long = long
        self._numbers = count()
        self._keys = count()
        for name in ("objects", "ledgers", "logs", "deaths", "tmp"):
            (directory / name).mkdir()
        self.deaths = directory / "deaths"
        self.objects = directory / "objects"
        self.settings = {"max_connections": "80", "shared_buffers": "32MB"}
        self.postgres = PostgresServer(self.disk / "postgres", settings=self.settings).start()
        # What took its place by then ends by itself.
        stack.callback(self.postgres.stop)
        self.redis = stack.enter_context(RedisServer(directory / "redis").start())
        upgrade(self.postgres.url())
        target = self.postgres_address
        # Of the workers' database, the producers', and the one of those who must always see.
        self.cold, self.hot, self.direct = (stack.enter_context(Proxy(target)) for _ in range(3))
        # Of all programs' Redis, and the last worker's alone.
        redis = Address(port=urlsplit(self.redis.url).port or 0)
        self.messages, self.apart = (stack.enter_context(Proxy(redis)) for _ in range(2))
        self.url = self._through(self.direct)
        self.ledger = Ledger()
        with self.connect() as conn:
            create_topic(conn, "faults", 16, retention_bytes=RETENTION_BYTES)
            self.ids = partition_ids(conn, "faults")
        self.programs = Programs(directory / "logs", self._environment())
        stack.callback(self.programs.stop)
        own = {"TIDEMARK_BROKER_URL": self._broker(self.apart)}
        self.workers = [self._worker(n, own if n == workers else {}) for n in range(1, workers + 1)]
        self.beat = self.programs.celery("beat", "beat", "-l", "WARNING")
        self.producers = [self._producer() for _ in range(producers)]
        # Those that a fault has stopped, and that it starts again itself.
        self.resting: set[Process] = set()
        self.restarts = 0
        database = Database(self.url, Settings(database_url=self.url), threads=3)
        stack.callback(database.close)
        self.watcher = stack.enter_context(Watcher(database, self.ids, self.ledger))
        self.reader = stack.enter_context(Reader(database, self.watcher, self.ledger))
        ledgers = LedgerTail(directory / "ledgers")
        self.meter = Meter(ledgers, self.ledger, self.watcher, {"faults": self.ids})
        # Called with each tick.
        self.each_tick: Callable[[], None] = lambda: None

    @property
    def postgres_address(self) -> Address:
        return Address(socket=f"{conninfo_to_dict(self.postgres.url())['host']}/.s.PGSQL.5432")

    def take_over(self, server: PostgresServer) -> None:
        """Everybody talks to this server from now on, as after a change of a name or of a load balancer."""
        self.postgres = server
        for proxy in (self.cold, self.hot, self.direct):
            proxy.target = self.postgres_address
            proxy.cut()

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[TupleRow]]:
        with psycopg.connect(self.url, autocommit=True, connect_timeout=5) as conn:
            yield conn

    def tick(self) -> None:
        """Start again what has ended, and take in what producers wrote down."""
        self.watcher.require_well()
        self.reader.require_well()
        self.meter.read_ledgers()
        self.each_tick()
        for program in (*self.workers, self.beat):
            if not program.running and program not in self.resting:
                self.restarts += 1
                program.restart()
        for number, producer in enumerate(self.producers):
            if not producer.running:
                producer.close()
                self.producers[number] = self._producer()

    def pause(self, seconds: float) -> None:
        """Let it run on for so long."""
        self.wait(lambda: False, seconds, fails=False)

    def wait(self, condition: Callable[[], object], seconds: float, what: str = "", *, fails: bool = True) -> None:
        """Wait until `condition`; DemoError with `what` is still not so, when that takes longer than `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                if fails:
                    raise DemoError(f"after {seconds:g} s still not: {what}")
                return
            self.tick()
            time.sleep(_TICK)

    def new_key(self, kind: str) -> str:
        """For an object of our own."""
        return f"{PREFIX}{kind}/{next(self._keys)}"

    def recover(self) -> float:
        """Commit a batch to every partition, and wait until each has its offset; returns the seconds it took."""
        began = time.monotonic()
        key = self.new_key("probe")
        objects: dict[int, str] = {}

        def it_is_committed() -> bool:
            if not self.postgres.running:
                self.postgres.restart()
            with Outage(), self.connect() as conn:
                objects[commit_everywhere(conn, self.objects, self.ledger, key, self.ids)] = key
            return bool(objects)

        def it_has_its_offsets() -> bool:
            with Outage(), self.connect() as conn:
                return not any(receipt.is_pending for receipt in ask_noted(conn, self.ledger, objects))
            return False

        self.wait(it_is_committed, _RECOVER_SECONDS, "a commit succeeds")
        self.wait(it_has_its_offsets, _RECOVER_SECONDS, "its batches have their offsets")
        return time.monotonic() - began

    def finish(self) -> list[Finding]:
        """End the load, drain, and check everything: the history, and by the product's own audit."""
        for producer in self.producers:
            # Where its commits are under way: nobody is told what became of them.
            producer.kill()
            producer.close()
        self.producers = []
        self.wait(self._is_drained, _RECOVER_SECONDS, "the backlog is drained")
        self.watcher.finish()
        self.reader.finish()
        # Nothing is deleted any more while the log is read.
        self.programs.stop(_STOP_SECONDS)
        self.meter.read_ledgers()
        with self.connect() as conn:
            evidence = collect(
                conn,
                self.ids,
                self.ledger,
                key_prefix=PREFIX,
                objects=self.objects,
                looks=self.watcher.looks,
                fetched=self.reader.fetched,
            )
            audited = audit(conn, from_scratch=True)
        findings = check(evidence)
        wrong = f"{len(audited.violations)} violations, first {audited.violations[0]}" if audited.violations else None
        own = Finding(number=len(findings) + 1, name="audit", counted=f"{audited.batches:,} batches", violation=wrong)
        return [*findings, own]

    def _is_drained(self) -> bool:
        with Outage(), self.connect() as conn:
            return backlog(conn, self.ids) == 0
        return False

    def _worker(self, number: int, env: dict[str, str]) -> Process:
        argv = celery_argv("worker", "-n", f"worker{number}@faults", "-l", "WARNING", app="tests.faults.mortal")
        return self.programs.process(f"worker{number}", argv, env)

    def _producer(self) -> Process:
        number = next(self._numbers)
        order = Order(
            number=number,
            key_prefix=PREFIX,
            rate=self._rate,
            partition_ids=self.ids,
            objects=str(self.objects),
            ledger=str(self.directory / "ledgers" / f"producer-{number}.jsonl"),
        )
        argv = [sys.executable, "-m", "tests.demo.producer", order.to_json()]
        env = {"TIDEMARK_DATABASE_URL": self._through(self.hot)}
        producer = self.programs.process(f"producer {number}", argv, env, may_end=True)
        producer.tell(Shift(start=time.monotonic()).to_json())
        return producer

    def _environment(self) -> dict[str, str]:
        return {
            **_SETTINGS,
            "TIDEMARK_DATABASE_URL": self._through(self.cold),
            "TIDEMARK_BROKER_URL": self._broker(self.messages),
            "TIDEMARK_DATA_DIR": str(self.directory / "data"),
            "TIDEMARK_OBJECT_STORE": f"file://{self.directory / 'objects'}",
            "TIDEMARK_TEST_DEATHS": str(self.deaths),
            "TMPDIR": str(self.directory / "tmp"),
            "PYTHONUNBUFFERED": "1",
        }

    @staticmethod
    def _through(proxy: Proxy) -> str:
        return f"postgresql://tidemark@127.0.0.1:{proxy.port}/tidemark"

    def _broker(self, proxy: Proxy) -> str:
        parts = urlsplit(self.redis.url)
        return parts._replace(netloc=f":{parts.password}@127.0.0.1:{proxy.port}").geturl()
