"""The same backlog drained by real workers and by a bare loop: `python -m tests.benchmarks.through_celery`.

Two workers that lease the shards, against two processes that call `db.materialize` in a loop. The clock starts when the
fan-out is called, and ends when the last event has its offset.
"""

import argparse
import signal
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from config.embedded.redis import RedisServer
from config.settings import Settings
from tasks import discovery, maintenance, materialization
from tasks.application import TidemarkApp
from tasks.discovery import fan_out_once
from tests.acceptance.nodes import Process, celery_argv
from tests.benchmarks.cold import Backlog, drain, shares
from tests.benchmarks.crew import Crew
from tests.benchmarks.measure import Sample, interleave, share
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import fresh, list_objects, load

_WORKERS = 2
_DEADLINE = 120.0
# Each look costs the server a part of a millisecond, on the cores that are measured.
_LOOK_SECONDS = 0.02
_BACKLOGS = {
    "16 partitions x 12,500": Backlog(partitions=16, events_each=12_500, group=1),
    "2,000 partitions x 100": Backlog(partitions=2_000, events_each=100, group=200),
}


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
        row = conn.execute("select sum(end_offset) from tidemark.topic_partitions").fetchone()
        if row is not None and row[0] == records:
            return
        if time.perf_counter() > deadline:
            raise RuntimeError(f"not drained after {_DEADLINE:g} s: {row} of {records} records")
        time.sleep(_LOOK_SECONDS)


def _through_celery(conn: psycopg.Connection[Any], app: TidemarkApp, backlog: Backlog) -> Sample:
    records = _reset(conn, backlog)
    begin = time.perf_counter()
    fan_out_once(app)
    _wait(conn, records)
    return Sample(seconds=time.perf_counter() - begin, cpu_seconds=0.0, units=backlog.events)


def _bare(conn: psycopg.Connection[Any], crew: Crew, backlog: Backlog) -> Sample:
    _reset(conn, backlog)
    return crew.run(drain, shares(backlog, crew.size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: %(default)s)")
    rounds = parser.parse_args().rounds
    with ExitStack() as stack:
        url = stack.enter_context(running_server())
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-celery-")))
        directory.chmod(0o711)
        redis = stack.enter_context(RedisServer.start(directory / "redis"))
        app = TidemarkApp("tidemark-bench", set_as_current=False)
        app.settings = Settings(database_url=url, broker_url=redis.url, data_dir=directory)
        for module in (materialization, discovery, maintenance):
            module.register(app)
        env = {
            "TIDEMARK_DATABASE_URL": url,
            "TIDEMARK_BROKER_URL": redis.url,
            "TIDEMARK_DATA_DIR": str(directory),
        }
        for number in range(_WORKERS):
            name = f"w{number}"
            worker = Process(celery_argv("worker", "-n", f"{name}@bench", "-l", "INFO"), env, directory / f"{name}.log")
            stack.callback(worker.end)
        conn = stack.enter_context(psycopg.connect(url, autocommit=True))
        crew = stack.enter_context(Crew(url, _WORKERS))
        stack.callback(app.database.close)
        # The first drain waits for the workers to be up and to have shared the shards.
        _through_celery(conn, app, next(iter(_BACKLOGS.values())))
        for name, backlog in _BACKLOGS.items():
            results = interleave(
                {
                    "celery": partial(_through_celery, conn, app, backlog),
                    "bare": partial(_bare, conn, crew, backlog),
                },
                rounds,
            )
            celery, bare = results["celery"], results["bare"]
            print(  # noqa: T201 -- what this program is for
                f"{name:<26} through Celery {celery.rate:>9,.0f}/s   bare loop {bare.rate:>9,.0f}/s   "
                f"share {share(celery, bare):.2f}"
            )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    main()
