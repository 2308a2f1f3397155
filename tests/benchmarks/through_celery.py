"""The same backlog drained by real workers and by a bare loop.

A part of all benchmarks, and a program of its own: `python -m tests.benchmarks.through_celery`.

Two workers that lease the shards, against two processes that call `db.materialize` in a loop. The clock starts when the
fan-out is called, and ends when the last event has its offset.
"""

import argparse
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import psycopg

from config.queues import shard_of_queue
from tasks.app import TidemarkApp
from tasks.dispatch import fan_out
from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, drain, shares
from tests.benchmarks.crew import Crew
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Measurement, compared, seconds_for
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import fresh, list_objects, load, placed
from tests.demo.programs import Programs
from tests.servers import RedisServer
from tests.support_commands import app_for

_WORKERS = 2
_DEADLINE = 120.0
# Each look costs the server a part of a millisecond, on the cores that are measured: rarely, until it is nearly over.
_LOOK_SECONDS, _LAST_LOOKS_SECONDS = 0.02, 0.003
_NEARLY = 0.9
_REHEARSALS = 3
_REHEARSED = Backlog(partitions=16, events_each=1_000, group=1)
_NOTE = f"limit: {_WORKERS} processes that call db.materialize in a loop"


def _reset(conn: psycopg.Connection[Any], backlog: Backlog) -> int:
    """A fresh backlog; returns the records in it."""
    fresh(conn, backlog.partitions)
    load(conn, backlog.partitions, backlog.events_each)
    list_objects(conn)
    row = conn.execute("select sum(n_records) from tidemark.record_batch_events").fetchone()
    assert row is not None
    return int(row[0])


def _wait(conn: psycopg.Connection[Any], records: int) -> None:
    deadline = time.perf_counter() + _DEADLINE
    while True:
        done = placed(conn)
        if done == records:
            return
        if time.perf_counter() > deadline:
            raise RuntimeError(f"not drained after {_DEADLINE:g} s: {done} of {records} records")
        time.sleep(_LAST_LOOKS_SECONDS if done >= _NEARLY * records else _LOOK_SECONDS)


def _await_workers(app: TidemarkApp) -> None:
    """Until the workers are up and have shared the shards: before, one would drain everything."""
    deadline = time.perf_counter() + _DEADLINE
    while True:
        consumed = app.control.inspect(limit=_WORKERS, timeout=1.0).active_queues() or {}
        counts = [sum(shard_of_queue(q["name"]) is not None for q in queues) for queues in consumed.values()]
        if counts == [app.settings.shards // _WORKERS] * _WORKERS:
            return
        if time.perf_counter() > deadline:
            raise RuntimeError(f"the workers have not shared the shards after {_DEADLINE:g} s: {counts}")


class Rig:
    """A server, Redis, two workers, and two processes that do without them."""

    def __init__(self, stack: ExitStack) -> None:
        url = stack.enter_context(running_server())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-celery-")))
        directory.chmod(0o711)
        redis = stack.enter_context(RedisServer(directory / "redis").start())
        self.conn: psycopg.Connection[Any] = stack.enter_context(psycopg.connect(url, autocommit=True))
        self.crew = stack.enter_context(Crew(url, _WORKERS))
        self._app = stack.enter_context(app_for(url, redis.url, data_dir=directory))
        env = {
            "TIDEMARK_DATABASE_URL": url,
            "TIDEMARK_BROKER_URL": redis.url,
            "TIDEMARK_DATA_DIR": str(directory),
        }
        programs = Programs(directory, env)
        stack.callback(programs.stop)
        for name in (f"w{number}" for number in range(_WORKERS)):
            programs.celery(name, "worker", "-n", f"{name}@bench")

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Self]:
        with ExitStack() as stack:
            rig = cls(stack)
            _await_workers(rig._app)
            # Connections, caches and prepared statements are then those of processes that have been running.
            for _ in range(_REHEARSALS):
                rig.through_celery(_REHEARSED)
                rig.bare(_REHEARSED)
            yield rig

    def through_celery(self, backlog: Backlog) -> Sample:
        records = _reset(self.conn, backlog)
        begin = time.perf_counter()
        fan_out(self._app)
        _wait(self.conn, records)
        return Sample(seconds=time.perf_counter() - begin, cpu_seconds=0.0, units=backlog.events)

    def bare(self, backlog: Backlog) -> Sample:
        _reset(self.conn, backlog)
        return self.crew.run(drain, shares(backlog, self.crew.size))


def plan_celery(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    def through_celery(backlog: Backlog) -> Sample:
        return bench.keep("celery", Rig.running).through_celery(backlog)

    def bare(backlog: Backlog) -> Sample:
        return bench.keep("celery", Rig.running).bare(backlog)

    plan: list[Measurement] = []
    for partitions, events_each, group in ((16, 12_500, 1), (2_000, 100, 200)):
        backlog = Backlog(partitions=partitions, events_each=events_each // (2 if quick else 1), group=group)
        arms = {"ours": partial(through_celery, backlog), "limit": partial(bare, backlog)}
        scenario = f"{partitions:,} partitions x {backlog.events_each:,}"
        # The workers have to start, too.
        seconds = 2.0 + seconds_for(backlog.events)
        plan.append(compared("celery", scenario, arms, rounds, seconds=seconds, note=_NOTE))
    return plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: %(default)s)")
    rounds = parser.parse_args().rounds
    with Bench() as bench, bench.part():
        for measurement in plan_celery(bench, rounds, quick=False):
            for entry in measurement.take(lambda: None):
                print(  # noqa: T201 -- what this program is for
                    f"{entry.scenario:<26} through Celery {entry.ours:>9,.0f}/s   "
                    f"bare loop {entry.limit:>9,.0f}/s   share {entry.vs_limit:.2f}"
                )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
