"""The eight optimizations of the seed's page, each with and without.

In these entries `ours` is the rate with the optimization and `baseline` the rate without it, on the same system.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any

import psycopg
from psycopg_pool import ConnectionPool

from config.strategy import Strategy
from db.arrays import Int4Array
from db.commit import commit_object
from db.execute import run
from db.materialize import materialize
from tests.benchmarks.baseline import system
from tests.benchmarks.cold import Backlog, Share, drain, shares
from tests.benchmarks.crew import Crew
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.hot import PARTITIONS, Production, produce
from tests.benchmarks.measure import Sample, interleave
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import fresh, load

Conn = psycopg.Connection[Any]
Arm = Callable[[], Sample]

_DEEP = Backlog(partitions=16, events_each=6_250, group=1)
_THIN = Backlog(partitions=2_000, events_each=10, group=200)
_SEED_EVENTS = 20_000
# What PostgreSQL sets by itself.
_DEFAULTS = {
    "shared_buffers": "128MB",
    "effective_cache_size": "4GB",
    "work_mem": "4MB",
    "maintenance_work_mem": "64MB",
    "max_wal_size": "1GB",
    "min_wal_size": "80MB",
    "checkpoint_timeout": "5min",
    "wal_compression": "off",
    "jit": "on",
    "random_page_cost": "4",
    "autovacuum_naptime": "1min",
}
_THREADS = 8


def drain_with(conn: Conn, work: tuple[Strategy, Share]) -> int:
    """As `drain`, by a strategy."""
    strategy, share = work
    events = 0
    for first in range(share.first, share.last + 1, share.group):
        left: Sequence[int] = range(first, min(first + share.group, share.last + 1))
        while left:
            done = materialize(conn, left, events_per_partition=share.events_per_partition, strategy=strategy)
            events += done.events_processed
            left = done.backlog_partition_ids
    return events


def drain_unpinned(conn: Conn, share: Share) -> int:
    """As `drain`, with the planner left to itself."""
    events = 0
    for first in range(share.first, share.last + 1, share.group):
        left = list(range(first, min(first + share.group, share.last + 1)))
        while left:
            with conn.transaction():
                run(conn, "lock_partitions", (Int4Array(left),))
                moved = run(conn, "place_window", (Int4Array(left), share.events_per_partition)).fetchall()
            events += sum(row[1] for row in moved)
            left = [row[0] for row in moved if row[4]]
    return events


def produce_and_place(conn: Conn, work: Production) -> int:
    """Sequence in the committing transaction, as systems without a cold path do."""
    for number in range(work.commits):
        with conn.transaction():
            ids = [n % PARTITIONS + 1 for n in range(work.batches)]
            # First, for in this transaction the snapshot must be younger than the wait for the lock.
            run(conn, "lock_partitions", (Int4Array(range(1, PARTITIONS + 1)),))
            commit_object(
                conn,
                f"bucket/producer-{work.producer}/{number:09}",
                ids,
                [1] * work.batches,
                range(work.batches),
                [1000] * work.batches,
                [0] * work.batches,
            )
            run(conn, "place_window", (Int4Array(range(1, PARTITIONS + 1)), 20_000))
    return work.commits * work.batches


def _seed(conn: Conn, crew: Crew, indexes: system.Indexes, form: system.Form) -> Sample:
    system.create(conn, 5, 4, indexes=indexes)
    system.load(conn, 4, _SEED_EVENTS, (100, 1_000))
    return crew.run(system.drain, [system.SeedShare(batch=500, form=form)] * crew.size)


def _cold(conn: Conn, crew: Crew, backlog: Backlog, job: Callable[[Conn, Any], int], *arguments: Any) -> Sample:
    fresh(conn, backlog.partitions)
    load(conn, backlog.partitions, backlog.events_each)
    work: list[Any] = [(*arguments, share) if arguments else share for share in shares(backlog, crew.size)]
    return crew.run(job, work)


def _hot(conn: Conn, crew: Crew, job: Callable[[Conn, Any], int]) -> Sample:
    fresh(conn, PARTITIONS)
    return crew.run(job, [Production(producer=n, commits=60, batches=100) for n in range(crew.size)])


def _pooled(conn: Conn, url: str, size: int) -> Sample:
    """Eight threads that share a pool of `size` connections."""
    fresh(conn, _THIN.partitions)
    load(conn, _THIN.partitions, _THIN.events_each)
    groups = shares(_THIN, _THIN.partitions // 50)
    with (
        ConnectionPool(url, min_size=size, max_size=size, kwargs={"autocommit": True}, open=True) as pool,
        ThreadPoolExecutor(_THREADS) as threads,
    ):
        pool.wait()

        def one(share: Share) -> int:
            with pool.connection() as own:
                return drain(own, share)

        begin = perf_counter()
        events = sum(threads.map(one, groups))
        return Sample(seconds=perf_counter() - begin, cpu_seconds=0.0, units=events)


def run_claims(url: str, conn: Conn, rounds: int, *, quick: bool, tick: Callable[[str], object]) -> list[Entry]:
    entries: list[Entry] = []

    def measure(claim: str, what: str, on: Arm, off: Arm) -> None:
        tick(claim)
        results = interleave({"ours": on, "baseline": off}, rounds)
        entries.append(compare(f"claim {claim[0]}", f"{claim}: {what}", results, note="with / without"))

    with Crew(url, 1) as one, Crew(url, 4) as four:
        bare = partial(_seed, conn, one, "bare", "materialize")
        page = partial(_seed, conn, one, "page", "materialize")
        measure("1 index", "the page's index, seed", page, bare)
        measure("1 index", "a partial index, seed", partial(_seed, conn, one, "partial", "materialize"), bare)

        aware = partial(_seed, conn, four, "page", "aware")
        measure("2 batching", "by partition, seed", aware, partial(_seed, conn, four, "page", "materialize"))
        alone = Backlog(partitions=_THIN.partitions, events_each=_THIN.events_each, group=1)
        grouped = partial(_cold, conn, one, _THIN, drain)
        measure("2 batching", "200 thin partitions or 1", grouped, partial(_cold, conn, one, alone, drain))

        for name, backlog in (("deep", _DEEP), ("thin", _THIN)):
            recursion = partial(_cold, conn, one, backlog, drain_with, "incremental")
            measure("3 incremental", name, recursion, partial(_cold, conn, one, backlog, drain_with, "window"))

        small = Backlog(partitions=16, events_each=6_250, group=1, events_per_partition=500)
        deep = partial(_cold, conn, one, _DEEP, drain)
        measure("4 batch size", "20,000 events or 500", deep, partial(_cold, conn, one, small, drain))

        measure(
            "5 hot and cold", "commit alone or with offsets", partial(_hot, conn, four, produce),
            partial(_hot, conn, four, produce_and_place),
        )  # fmt: skip

        unpinned = partial(_cold, conn, one, _THIN, drain_unpinned)
        measure("6 plans", "pinned or not, thin", grouped, unpinned)
        measure("6 plans", "pinned or not, deep", deep, partial(_cold, conn, one, _DEEP, drain_unpinned))

        with _plain_server() as (plain_conn, plain):
            measure("7 configuration", "shipped or default", deep, partial(_cold, plain_conn, plain, _DEEP, drain))

    pooled = partial(_pooled, conn, url)
    for size in (2, 25) if quick else (2, 4, 8, 25):
        measure("8 pool", f"{size} connections or 1", partial(pooled, size), partial(pooled, 1))
    return entries


@contextmanager
def _plain_server() -> Any:
    with (
        running_server(_DEFAULTS) as url,
        psycopg.connect(url, autocommit=True) as conn,
        Crew(url, 1) as crew,
    ):
        yield conn, crew
