"""Commit → visible: `python -m tests.benchmarks.latency [--samples N]`.

Three arms, interleaved in one run on one server: commits that wake their partitions, commits that wait for the fan-out
(at its default interval), and a poller as the seed has it, which materializes whatever is pending every 100 ms, in a
database of its own. Times are from before the commit until a reader sees the new end offset.
"""

import argparse
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import psycopg

from db.commit import commit_object
from db.discover import sweep
from db.materialize import materialize
from db.migrate import upgrade
from db.topics import create_topic, partition_ids
from tasks.dispatch import commit_and_wake
from tests.demo.programs import Programs
from tests.servers import PostgresServer, RedisServer
from tests.support_commands import app_for

PARTITIONS = 16
_POLL_SECONDS = 0.1
_LOOK_SECONDS = 0.001
_GIVE_UP_SECONDS = 30.0

Commit = Callable[[str, int], object]


def poll(url: str, stop: Event) -> None:
    """Materialize what is pending, every 100 ms."""
    with psycopg.connect(url, autocommit=True) as conn:
        while not stop.wait(_POLL_SECONDS):
            if ids := [pending.partition_id for pending in sweep(conn)]:
                materialize(conn, ids)


class Reader:
    """Waits for commits to become visible in one database."""

    def __init__(self, url: str) -> None:
        self.conn = psycopg.connect(url, autocommit=True)
        create_topic(self.conn, "latency", PARTITIONS)
        self.partitions = partition_ids(self.conn, "latency")

    def end_offset(self, partition: int) -> int:
        row = self.conn.execute(
            "select end_offset from tidemark.runs where partition_id = %s order by start_offset desc limit 1",
            (partition,),
        ).fetchone()
        return int(row[0]) if row else 0

    def measure(self, commit: Commit, key: str) -> float:
        partition = random.choice(self.partitions)
        before = self.end_offset(partition)
        began = time.perf_counter()
        commit(key, partition)
        while self.end_offset(partition) == before:
            if time.perf_counter() > began + _GIVE_UP_SECONDS:
                raise TimeoutError(f"{key} is not visible after {_GIVE_UP_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)
        return time.perf_counter() - began


def arguments(partition: int) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    return [partition], [10], [0], [1000], [1_700_000_000_000]


def percentile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def run(samples: int, stack: ExitStack) -> dict[str, list[float]]:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-latency-")))
    directory.chmod(0o711)
    postgres = stack.enter_context(PostgresServer(directory / "postgres").start())
    redis = stack.enter_context(RedisServer(directory / "redis").start())
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("create database polled")
    for url in (postgres.url(), postgres.url("polled")):
        upgrade(url)
    env = {
        "TIDEMARK_DATABASE_URL": postgres.url(),
        "TIDEMARK_BROKER_URL": redis.url,
        "TIDEMARK_DATA_DIR": str(directory),
    }
    programs = Programs(directory, env)
    stack.callback(programs.stop)
    for name in ("worker", "beat"):
        programs.celery(name, name)
    app = stack.enter_context(app_for(postgres.url(), redis.url))
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    poller = context.Process(target=poll, args=(postgres.url("polled"), stop))
    poller.start()
    stack.callback(poller.join)
    stack.callback(stop.set)

    ours, polled = Reader(postgres.url()), Reader(postgres.url("polled"))
    producer: psycopg.Connection[Any] = psycopg.connect(postgres.url(), autocommit=True)
    other: psycopg.Connection[Any] = psycopg.connect(postgres.url("polled"), autocommit=True)
    for conn in (ours.conn, polled.conn, producer, other):
        stack.callback(conn.close)
    arms: dict[str, tuple[Reader, Commit]] = {
        "wake-up": (ours, lambda key, p: commit_and_wake(app, producer, key, *arguments(p))),
        "fan-out only": (ours, lambda key, p: commit_object(producer, key, *arguments(p))),
        "100 ms poller": (polled, lambda key, p: commit_object(other, key, *arguments(p))),
    }
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-3, samples):
        for name, (reader, commit) in arms.items():
            # Anywhere between two ticks.
            time.sleep(random.uniform(0.0, _POLL_SECONDS))
            seconds = reader.measure(commit, f"{name}/{number}")
            # The first ones wait for the worker to start, and fill caches.
            if number >= 0:
                times[name].append(seconds)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=200, help="commits of each kind (default: %(default)s)")
    samples = parser.parse_args().samples
    with ExitStack() as stack:
        times = run(samples, stack)
    base = percentile(times["100 ms poller"], 50)
    sys.stdout.write(f"{'commit → visible':<16}{'p50 ms':>9}{'p99 ms':>9}{'p50 / poller':>14}\n")
    for name, values in times.items():
        p50, p99 = percentile(values, 50), percentile(values, 99)
        sys.stdout.write(f"{name:<16}{p50 * 1000:>9.1f}{p99 * 1000:>9.1f}{p50 / base:>14.2f}\n")


if __name__ == "__main__":
    main()
