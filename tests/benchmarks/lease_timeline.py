"""Who has which shard while workers come and go: `python -m tests.benchmarks.lease_timeline [--lease SECONDS]`.

One worker, then four, one is killed with SIGKILL, one is stopped. Commits go to every shard all the time; the longest
time a shard stood still is what counts.
"""

import argparse
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import psycopg
from redis import Redis

from db.commit import Batch, columns, commit_object
from db.migrate import upgrade
from db.topics import create_topic, partition_ids
from tasks.hints import read_programs, redis_time
from tests.demo.programs import Process, Programs
from tests.servers import PostgresServer, RedisServer

SHARDS = 8
_ENDS = "select partition_id, end_offset from tidemark.named_partitions"
_SAMPLE_SECONDS = 0.1
_SETTLE_SECONDS = 40.0


class StartWorker(Protocol):
    """Starts `celery -A tasks worker -n NAME@test` without queues."""

    def __call__(self, name: str) -> Process: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """Owner by shard at a moment, and seconds since each shard's log grew."""

    at: float
    owners: Mapping[int, str]
    still: Mapping[int, float]


@dataclass(kw_only=True)
class Timeline:
    """What was seen, and what was done when."""

    samples: list[Sample] = field(default_factory=list)
    events: list[tuple[float, str]] = field(default_factory=list)

    def longest(self, since: str, until: str | None = None) -> float:
        """Longest time any shard stood still between two events."""
        begin = next(at for at, what in self.events if what == since)
        end = next((at for at, what in self.events if what == until), float("inf"))
        # What a shard stood still before the first event is not its fault.
        return max(min(s, x.at - begin) for x in self.samples if begin <= x.at <= end for s in x.still.values())


class Watch:
    """Commits to every partition, and looks at heads and leases, until it is closed."""

    def __init__(self, database_url: str, redis_url: str, timeline: Timeline, *, lease: float) -> None:
        self._lease = lease
        self._database_url = database_url
        self._redis = Redis.from_url(redis_url, decode_responses=True)
        self._timeline = timeline
        self._began = time.monotonic()
        self._stop = threading.Event()
        self.commits = 0
        with psycopg.connect(database_url, autocommit=True) as conn:
            create_topic(conn, "timeline", SHARDS)
            self._partitions = partition_ids(conn, "timeline")
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._commit, self._sample)]
        for thread in self._threads:
            thread.start()

    @property
    def now(self) -> float:
        return time.monotonic() - self._began

    def event(self, what: str) -> None:
        self._timeline.events.append((self.now, what))

    def owners(self) -> dict[int, str]:
        """Worker name by shard, as the workers tell; without those that have told nothing for the lease's time."""
        now = redis_time(self._redis)
        entries = read_programs(self._redis, now).values()
        return {s: e.name.split("@")[0] for e in entries if e.seen > now - self._lease for s in e.consumes}

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        self._redis.close()

    def _commit(self) -> None:
        with psycopg.connect(self._database_url, autocommit=True) as conn:
            while not self._stop.wait(0.1):
                self.commits += 1
                batches = [
                    Batch(partition_id=p, n_records=1, byte_offset=n, byte_length=1, max_timestamp=0)
                    for n, p in enumerate(self._partitions)
                ]
                commit_object(conn, f"timeline/{self.commits:06}", *columns(batches))

    def _sample(self) -> None:
        grown: dict[int, tuple[int, float]] = {}
        with psycopg.connect(self._database_url, autocommit=True) as conn:
            while not self._stop.wait(_SAMPLE_SECONDS):
                now = self.now
                for partition, end in conn.execute(_ENDS).fetchall():
                    if partition % SHARDS not in grown or grown[partition % SHARDS][0] != end:
                        grown[partition % SHARDS] = (end, now)
                still = {shard: now - at for shard, (_, at) in grown.items()}
                self._timeline.samples.append(Sample(at=now, owners=self.owners(), still=still))


def balanced(watch: Watch, workers: int) -> Callable[[], bool]:
    """Whether that many workers own all shards, in shares that differ by one at most."""

    def all_shards_are_owned_in_fair_shares() -> bool:
        owners = list(watch.owners().values())
        counts = [owners.count(w) for w in set(owners)]
        return len(owners) == SHARDS and len(counts) == workers and max(counts) - min(counts) <= 1

    return all_shards_are_owned_in_fair_shares


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _SETTLE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"after {_SETTLE_SECONDS:g} s still not: {condition.__name__}")
        time.sleep(0.02)


def play(watch: Watch, start: StartWorker) -> list[Process]:
    """Start 1, then 4, kill one, stop one; returns the processes."""
    workers = [start("w1")]
    _until(balanced(watch, 1))
    watch.event("one worker has all shards")
    workers += [start(f"w{n}") for n in (2, 3, 4)]
    _until(balanced(watch, 4))
    watch.event("four workers share them")
    time.sleep(1)
    watch.event("kill -9 w2")
    workers[1].kill()
    _until(balanced(watch, 3))
    watch.event("three workers share them")
    time.sleep(1)
    watch.event("stop w3")
    workers[2].signal(signal.SIGTERM)
    _until(balanced(watch, 2))
    watch.event("two workers share them")
    time.sleep(1)
    watch.event("end")
    return workers


def render(timeline: Timeline, every: float = 0.5) -> str:
    """A row per half second: the owner of each shard, and the longest a shard stands still."""
    lines = [f"{'s':>6}  " + " ".join(f"{f'shard {n}':>8}" for n in range(SHARDS)) + "   longest still"]
    events = list(timeline.events)
    shown: tuple[Any, ...] = ()
    printed = -every
    for sample in timeline.samples:
        while events and events[0][0] <= sample.at:
            at, what = events.pop(0)
            lines.append(f"{at:6.1f}  -- {what}")
        owners = tuple(sample.owners.get(n, "-") for n in range(SHARDS))
        if owners != shown or sample.at - printed >= every * 4:
            still = max(sample.still.values(), default=0.0)
            lines.append(f"{sample.at:6.1f}  " + " ".join(f"{o:>8}" for o in owners) + f"   {still:8.1f} s")
            shown, printed = owners, sample.at
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lease", type=float, default=15.0, help="TIDEMARK_LEASE_SECONDS (default: %(default)s)")
    lease = parser.parse_args().lease
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-timeline-")))
        directory.chmod(0o711)
        postgres = stack.enter_context(PostgresServer(directory / "postgres").start())
        redis = stack.enter_context(RedisServer(directory / "redis").start())
        upgrade(postgres.url())
        env = {
            "TIDEMARK_DATABASE_URL": postgres.url(),
            "TIDEMARK_BROKER_URL": redis.url,
            "TIDEMARK_SHARDS": str(SHARDS),
            "TIDEMARK_LEASE_SECONDS": str(lease),
            "TIDEMARK_FAN_OUT_INTERVAL": "0.2",
            "TIDEMARK_DATA_DIR": str(directory),
        }

        programs = Programs(directory, env)
        stack.callback(programs.stop)
        timeline = Timeline()
        programs.celery("beat", "beat")
        watch = Watch(postgres.url(), redis.url, timeline, lease=lease)
        stack.callback(watch.close)
        play(watch, lambda name: programs.celery(name, "worker", "-n", f"{name}@test"))
        sys.stdout.write(render(timeline) + "\n\n")
        rows = (
            ("1 → 4 workers", "one worker has all shards", "kill -9 w2"),
            (f"kill -9 (lease: {lease:g} s)", "kill -9 w2", "stop w3"),
            ("stop", "stop w3", "end"),
        )
        for what, since, until in rows:
            longest = timeline.longest(since, until)
            sys.stdout.write(f"{what:<28} longest a shard stood still: {longest:.1f} s\n")


if __name__ == "__main__":
    main()
