"""The page's eighth claim: connection pools of several sizes, and retries, under deadlocks that are really there.

As many threads as the page has connections drain a share of the backlog each, one transaction after the other, over the
product's own pool. What is compared is what they do after a deadlock.
"""

import logging
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from time import perf_counter, sleep
from typing import Any, Protocol

import psycopg

from config.errors import TransientDatabaseError
from config.settings import Settings
from db.materialize import MaterializationMetrics, materialize
from db.pool import Database
from db.translate import is_transient
from tasks.retries import with_retries
from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, Share, shares
from tests.benchmarks.disturber import Disturbers, as_victim
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Result, Sample, interleave
from tests.benchmarks.plan import Arm, Measurement, Tick, seconds_for
from tests.benchmarks.tables import fresh, load

_GROUP = "claim 8"
_SIZES = (1, 2, 4, 8, 16, 25)
# The page's MaxOpenConns: with fewer threads the larger pools would be the same.
_THREADS = 25
_PAGE_STEP = 0.1
# What tasks.retries logs of each attempt would be printed where nobody else takes it.
_NOWHERE = logging.NullHandler()

Work = Callable[[], MaterializationMetrics]


class Retry(Protocol):
    def __call__(
        self, settings: Settings, work: Work, *, on_error: Callable[[BaseException], None]
    ) -> MaterializationMetrics: ...


def page_retry(settings: Settings, work: Work, *, on_error: Callable[[BaseException], None]) -> MaterializationMetrics:
    """The page's MaterializeWithRetry, with as many attempts as ours: pauses of 0, 100, 200, … milliseconds."""
    for attempt in range(settings.retries + 1):
        try:
            return work()
        except Exception as error:
            if not is_transient(error):
                raise
            on_error(error)
        sleep(attempt * _PAGE_STEP)
    raise TransientDatabaseError(f"materialization failed after {settings.retries + 1} retries")


class Drain:
    """A backlog drained by `_THREADS` threads over a pool."""

    def __init__(self, database: Database, settings: Settings, backlog: Backlog, retry: Retry) -> None:
        self._database = database
        self._settings = settings
        self._retry = retry
        self.shares = shares(backlog, _THREADS)
        self._finished: set[Share] = set()
        self._errors: list[BaseException] = []

    @property
    def failures(self) -> Counter[str]:
        """Failed attempts by the name of their error; TransientDatabaseError: transactions that were given up."""
        return Counter(type(error).__name__ for error in self._errors)

    def is_finished(self, share: Share) -> bool:
        return share in self._finished

    def run(self) -> Sample:
        with ThreadPoolExecutor(_THREADS) as threads:
            begin = perf_counter()
            events = sum(threads.map(self._drain, self.shares))
            return Sample(seconds=perf_counter() - begin, cpu_seconds=0.0, units=events)

    def _drain(self, share: Share) -> int:
        events = 0
        left: tuple[int, ...] = tuple(range(share.first, share.last + 1))
        while left:
            try:
                done = self._retry(self._settings, partial(self._once, share, left), on_error=self._errors.append)
            except TransientDatabaseError as error:
                # Whoever calls tries again: Celery in our case, after a pause that no arm is given here.
                self._errors.append(error)
                continue
            events += done.events_processed
            left = done.backlog_partition_ids
        self._finished.add(share)
        return events

    def _once(self, share: Share, ids: Sequence[int]) -> MaterializationMetrics:
        # A retry's pause holds no connection, neither here nor on the page.
        with self._database.connection() as conn:
            return materialize(conn, ids, events_per_partition=share.events_per_partition)


@contextmanager
def _warm_pool(url: str, settings: Settings) -> Iterator[Database]:
    """The product's pool, opened, each connection with its statements prepared."""
    database = Database(url, settings, threads=_THREADS)
    try:
        database.pool.wait()
        with ExitStack() as stack:
            for partition in range(1, settings.pool_open + 1):
                materialize(stack.enter_context(database.connection()), [partition])
        yield database
    finally:
        database.close()


def _check(conn: psycopg.Connection[Any], backlog: Backlog) -> None:
    """Every event was placed, none twice, and without gaps."""
    # Each event of a backlog has a byte offset of its own.
    found = conn.execute(
        """
        with placed as (
            select b.byte_offset, b.start_offset, b.n_records,
                   coalesce(lag(b.start_offset + b.n_records) over (w order by b.start_offset), 0) as expected
            from tidemark.record_batches b
            window w as (partition by b.partition_id)
        )
        select count(*), count(distinct byte_offset), count(*) filter (where start_offset <> expected),
               sum(n_records) - (select sum(end_offset) from tidemark.named_partitions)
        from placed
        """
    ).fetchone()
    if found != (backlog.events, backlog.events, 0, 0):
        raise RuntimeError(
            f"{backlog.events} events came to {found}: batches, different ones, gaps, records beyond the ends"
        )


class Trial:
    """The arms for one size of the pool, and what failed in them."""

    def __init__(self, bench: Bench, backlog: Backlog, size: int) -> None:
        self._bench = bench
        self._backlog = backlog
        self.size = size
        self._failures: dict[str, list[Counter[str]]] = {"ours": [], "page": []}

    def arm(self, size: int, *, page: bool = False, disturbed: bool = False) -> Sample:
        bench, backlog = self._bench, self._backlog
        settings = Settings(pool_open=size, pool_idle=size)
        fresh(bench.conn, backlog.partitions)
        logging.getLogger("tasks").addHandler(_NOWHERE)
        with _warm_pool(as_victim(bench.url), settings) as database:
            load(bench.conn, backlog.partitions, backlog.events_each)
            drain = Drain(database, settings, backlog, page_retry if page else with_retries)
            with Disturbers(bench.url, drain.shares, drain.is_finished) if disturbed else nullcontext():
                sample = drain.run()
        _check(bench.conn, backlog)
        failures = drain.failures
        deadlocks = failures["DeadlockDetected"]
        if failures.keys() - {"DeadlockDetected", "TransientDatabaseError"} or bool(deadlocks) != disturbed:
            raise RuntimeError(
                f"{deadlocks} deadlocks where there should be {'some' if disturbed else 'none'}: {failures}"
            )
        if disturbed:
            self._failures["page" if page else "ours"].append(failures)
        return sample

    def deadlocks(self, name: str) -> str:
        runs = self._failures[name]
        given_up = sum(failures["TransientDatabaseError"] for failures in runs)
        median = statistics.median(failures["DeadlockDetected"] for failures in runs)
        return f"{median:g}" + (f" ({given_up} given up)" if given_up else "")

    def entries(self, results: dict[str, Result]) -> list[Entry]:
        def entry(what: str, on: str, off: str, note: str) -> Entry:
            pair = {"ours": results[on], "baseline": results[off]}
            return compare(_GROUP, f"8 {what}, {self._connections}", pair, note=note)

        ours, page = self.deadlocks("ours"), self.deadlocks("page")
        pool = [entry("pool: more or 1", "plain", "one", "with / without")] if "one" in results else []
        return [
            *pool,
            entry("retries: ours or the page's", "ours", "page", f"deadlocks a run: ours {ours}, the page's {page}"),
            entry("retries: deadlocks or none", "ours", "plain", f"deadlocks a run: {ours}"),
        ]

    @property
    def _connections(self) -> str:
        return f"{self.size} connection{'s'[: self.size - 1]}"


def _planned(bench: Bench, backlog: Backlog, size: int, rounds: int) -> Measurement:
    trial = Trial(bench, backlog, size)
    arms: dict[str, Arm] = {
        "plain": partial(trial.arm, size),
        "ours": partial(trial.arm, size, disturbed=True),
        "page": partial(trial.arm, size, page=True, disturbed=True),
    }
    if size > 1:
        arms["one"] = partial(trial.arm, 1)

    def take(tick: Tick) -> list[Entry]:
        return trial.entries(interleave(arms, rounds, tick=tick))

    return Measurement(
        group=_GROUP,
        scenario=f"8 pool and retries, {size}",
        runs=len(arms) * rounds,
        seconds=2 * seconds_for(backlog.events),
        take=take,
    )


def plan_retries(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    # A share is eight partitions, and its transactions take 400 of its events.
    backlog = Backlog(partitions=200, events_each=500 if quick else 1_000, group=8, events_per_partition=50)
    return [_planned(bench, backlog, size, rounds) for size in ((2, 25) if quick else _SIZES)]
