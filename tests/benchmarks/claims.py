"""The eight optimizations of the seed's page, each with and without.

In these entries `ours` is the rate with the optimization and `baseline` the rate without it, on the same system.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg

from config.settings import DEFAULT_STRATEGY, Strategy
from db.arrays import Int4Array
from db.commit import commit_object
from db.statements import run
from tests.benchmarks.baseline import system
from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, Share, drain, shares
from tests.benchmarks.configuration import plan_configuration
from tests.benchmarks.hot import PARTITIONS, Production, produce
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Arm, Measurement, compared, seconds_for
from tests.benchmarks.retries import plan_retries
from tests.benchmarks.tables import fresh, load

Conn = psycopg.Connection[Any]

_DEEP = Backlog(partitions=16, events_each=6_250, group=1)
_THIN = Backlog(partitions=2_000, events_each=10, group=200)
_SEED_EVENTS = 20_000
_PLACE = f"place_{DEFAULT_STRATEGY}"


def drain_with(conn: Conn, work: tuple[Strategy, Share]) -> int:
    """As `drain`, by a strategy."""
    strategy, share = work
    return drain(conn, share, strategy)


def drain_planned(conn: Conn, work: tuple[bool, Share]) -> int:
    """As `drain`, with the plans pinned or the planner left to itself."""
    pinned, share = work
    events = 0
    for first in range(share.first, share.last + 1, share.group):
        left = list(range(first, min(first + share.group, share.last + 1)))
        while left:
            with conn.pipeline(), conn.transaction():
                if pinned:
                    run(conn, "transaction_settings", prepare=True)
                run(conn, "lock_partitions", (Int4Array(left),), prepare=True)
                placing = run(conn, _PLACE, (share.events_per_partition,), prepare=True)
                moved = placing.fetchall()
            events += sum(row[1] for row in moved)
            left = [row[0] for row in moved if row[5]]
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
            run(conn, _PLACE, (20_000,))
    return work.commits * work.batches


def _seed(bench: Bench, events: int, workers: int, indexes: system.Indexes, form: system.Form) -> Sample:
    system.create(bench.conn, 5, 4, indexes=indexes)
    system.load(bench.conn, 4, events, (100, 1_000))
    return bench.crew(workers).run(system.drain, [system.SeedShare(batch=500, form=form)] * workers)


def _cold(bench: Bench, backlog: Backlog, job: Callable[[Conn, Any], int], *arguments: Any) -> Sample:
    fresh(bench.conn, backlog.partitions)
    load(bench.conn, backlog.partitions, backlog.events_each)
    crew = bench.crew(1)
    work: list[Any] = [(*arguments, share) if arguments else share for share in shares(backlog, crew.size)]
    return crew.run(job, work)


def _hot(bench: Bench, job: Callable[[Conn, Any], int]) -> Sample:
    fresh(bench.conn, PARTITIONS)
    return bench.crew(4).run(job, [Production(producer=n, commits=60, batches=100) for n in range(4)])


def plan_claims(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    plan: list[Measurement] = []

    def add(claim: str, what: str, on: Arm, off: Arm, seconds: float) -> None:
        arms = {"ours": on, "baseline": off}
        scenario = f"{claim}: {what}"
        plan.append(compared(f"claim {claim[0]}", scenario, arms, rounds, seconds=seconds, note="with / without"))

    seed = partial(_seed, bench, _SEED_EVENTS // (2 if quick else 1))
    bare, page = (partial(seed, 1, indexes, "materialize") for indexes in ("bare", "page"))
    add("1 index", "the page's index, seed", page, bare, 2.0)
    add("1 index", "a partial index, seed", partial(seed, 1, "partial", "materialize"), bare, 2.0)

    aware, unaware = (partial(seed, 4, "page", form) for form in ("aware", "materialize"))
    add("2 batching", "by partition, seed", aware, unaware, 2.0)
    alone = Backlog(partitions=_THIN.partitions, events_each=_THIN.events_each, group=1)
    grouped = partial(_cold, bench, _THIN, drain)
    add("2 batching", "200 thin partitions or 1", grouped, partial(_cold, bench, alone, drain), 1.5)

    for name, backlog in (("deep", _DEEP), ("thin", _THIN)):
        recursion, window = (partial(_cold, bench, backlog, drain_with, form) for form in ("incremental", "window"))
        add("3 incremental", name, recursion, window, seconds_for(backlog.events))

    small = Backlog(partitions=16, events_each=6_250, group=1, events_per_partition=500)
    deep = partial(_cold, bench, _DEEP, drain)
    add("4 batch size", "20,000 events or 500", deep, partial(_cold, bench, small, drain), seconds_for(_DEEP.events))

    together, apart = partial(_hot, bench, produce_and_place), partial(_hot, bench, produce)
    add("5 hot and cold", "commit alone or with offsets", apart, together, 0.6)

    for name, backlog in (("thin", _THIN), ("deep", _DEEP)):
        pinned, unpinned = (partial(_cold, bench, backlog, drain_planned, pin) for pin in (True, False))
        add("6 plans", f"pinned or not, {name}", pinned, unpinned, seconds_for(backlog.events))

    plan += plan_configuration(bench, rounds, quick=quick)
    return plan + plan_retries(bench, rounds, quick=quick)
