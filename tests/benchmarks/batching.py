"""The batchings against each other: `python -m tests.benchmarks.batching [--rounds N] [--quick]`.

Workloads made for one or the other of them, every arm on fresh tables, interleaved; medians, and who was better in each
round. `collect` and `fixed` make the same plans but for bursts, so what lies between them elsewhere is noise. The
controllers are the workers' own, `tasks.batching`; what is left out is Celery. Results in build/bench/batching.json.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from threading import Event, Thread
from time import perf_counter, sleep
from typing import Any, get_args

import psycopg
from rich.console import Console
from rich.table import Table

from config.settings import Batching, Settings
from db.arrays import Int4Array
from db.commit import commit_object
from db.materialize import MaterializationMetrics, materialize
from db.statements import run
from tasks.batching import Controller, make_controller
from tests.benchmarks.crew import cpu_seconds
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import TX, fresh, load, wal_position

Conn = psycopg.Connection[Any]

# The one number `fixed` has is right for one workload; so it runs with a small and a large one as well.
ARMS: Mapping[str, Settings] = {
    **{name: Settings(batching=name) for name in get_args(Batching)},
    "fixed 1,000": Settings(batching="fixed", events_per_partition=1_000),
    "fixed 100,000": Settings(batching="fixed", events_per_partition=100_000),
}
# Less than this share apart is no win on a machine that does other things as well.
_NOISE = 0.05
_NEIGHBOUR_EVERY = 0.02
# Two transactions at the upper end of the dead band: a worker that comes back at once may have the lock again before
# the one who waited for it has woken up.
_PATIENCE_MS = 2 * 1.2e3 * Settings().batch_seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run of one arm. Times in milliseconds, CPU of the server and log in units per event."""

    events_per_second: float
    transactions: float
    longest_ms: float
    cpu_micros: float
    wal_bytes: float
    # From the start until a partition has nothing left, averaged over the partitions.
    caught_up_ms: float = 0.0
    # What another transaction waited for a partition: the worst wait.
    neighbour_ms: float = 0.0


class Worker:
    """Materializes as `tasks.drain` does, and keeps the figures."""

    def __init__(self, conn: Conn, controller: Controller) -> None:
        self._conn = conn
        self._controller = controller
        self._began, self._cpu, self._wal = perf_counter(), cpu_seconds(conn), wal_position(conn)
        self.times: list[float] = []
        self.events = 0
        self._caught_up: list[float] = []

    def drain(self, ids: Sequence[int]) -> None:
        left: tuple[int, ...] = tuple(ids)
        again = False
        while left:
            plan = self._controller.plan(left, again=again)
            done = materialize(self._conn, plan.partition_ids, events_per_partition=plan.events_per_partition)
            self._controller.done(done)
            self._note(done)
            taken = set(plan.partition_ids)
            before, left = left, done.backlog_partition_ids + tuple(i for i in left if i not in taken)
            self._caught_up += [perf_counter() - self._began] * (len(before) - len(left))
            again = True

    def _note(self, done: MaterializationMetrics) -> None:
        self.times.append(done.processing_time_ms / 1000)
        self.events += done.events_processed

    def result(self, *, events: int, neighbour: float = 0.0) -> Run:
        if self.events != events:
            raise RuntimeError(f"{self.events} of {events} events were taken")
        return Run(
            # Time in transactions: between them a workload may make its commits.
            events_per_second=events / sum(self.times),
            transactions=len(self.times),
            longest_ms=max(self.times) * 1e3,
            cpu_micros=(cpu_seconds(self._conn) - self._cpu) / events * 1e6,
            wal_bytes=(wal_position(self._conn) - self._wal) / events,
            caught_up_ms=statistics.fmean(self._caught_up) * 1e3,
            neighbour_ms=neighbour * 1e3,
        )


def _warm(conn: Conn, settings: Settings) -> None:
    """Prepared statements and caches are those of a worker that has been running."""
    fresh(conn, 20)
    load(conn, 20, 100)
    for _ in range(6):
        Worker(conn, make_controller(settings)).drain(range(1, 21))


def deep(conn: Conn, _url: str, settings: Settings, scale: float) -> Run:
    """Few partitions, each of which travels alone."""
    partitions, each = 8, round(60_000 * scale)
    _warm(conn, settings)
    fresh(conn, partitions)
    load(conn, partitions, each)
    # As in a worker process: what a controller learns on one partition serves the next.
    worker = Worker(conn, make_controller(settings))
    for partition in range(1, partitions + 1):
        worker.drain([partition])
    return worker.result(events=partitions * each)


def thin(conn: Conn, _url: str, settings: Settings, scale: float) -> Run:
    """Many partitions with 10 events, and in each task of 200 some that turned out deep."""
    partitions, each, deeper, more = round(2_000 * scale), 10, 5, 4_000
    _warm(conn, settings)
    fresh(conn, partitions)
    load(conn, partitions, each)
    chosen = [i for i in range(1, partitions + 1) if i % 200 < deeper]
    conn.execute(
        "insert into tidemark.record_batch_events "
        "(tx, id, byte_offset, max_timestamp, partition_id, n_records, byte_length) "
        f"select {TX}, p::bigint * 65536 + g, g, 0, p, 1, 1000 from unnest(%s::int[]) p, generate_series(1, %s) g",
        (chosen, more),
    )
    conn.execute("analyze tidemark.record_batch_events")
    worker = Worker(conn, make_controller(settings))
    for first in range(1, partitions + 1, 200):
        worker.drain(range(first, min(first + 200, partitions + 1)))
    return worker.result(events=partitions * each + len(chosen) * more)


def bursts(conn: Conn, _url: str, settings: Settings, scale: float) -> Run:
    """Small commits to the same partitions, 5 ms apart, each of which wakes its partitions."""
    partitions, batches, commits, apart = 16, 32, round(400 * scale), 0.005
    # Replayed without the pauses; a window collects as many commits as would arrive in it.
    together = max(1, round(settings.collect_seconds / apart)) if settings.batching == "collect" else 1
    _warm(conn, settings)
    fresh(conn, partitions)
    ids = [n % partitions + 1 for n in range(batches)]
    with psycopg.connect(conn.info.dsn, autocommit=True, password=conn.info.password) as producer:
        worker = Worker(conn, make_controller(settings))
        began = wal_position(conn)
        for number in range(commits):
            commit_object(
                producer, f"object-{number}", ids, [1] * batches, range(batches), [1000] * batches, [0] * batches
            )
            if (number + 1) % together == 0 or number + 1 == commits:
                # The log that the commits write is not the worker's.
                worker._wal += wal_position(conn) - began
                worker.drain(range(1, partitions + 1))
                began = wal_position(conn)
    return worker.result(events=commits * batches)


def hot(conn: Conn, url: str, settings: Settings, scale: float) -> Run:
    """One partition with all of the backlog, and a neighbour (retention, a second worker) that wants its lock."""
    events = round(400_000 * scale)
    _warm(conn, settings)
    controller = make_controller(settings)
    # As one that has been running on this server: its first guess is not what is measured.
    fresh(conn, 1)
    load(conn, 1, events // 2)
    Worker(conn, controller).drain([1])
    fresh(conn, 1)
    load(conn, 1, events)
    with _neighbour(url) as waits:
        worker = Worker(conn, controller)
        worker.drain([1])
    return worker.result(events=events, neighbour=max(waits))


def slow(conn: Conn, url: str, settings: Settings, scale: float) -> Run:
    """The same on a server that takes some 20 µs more for each batch, as one with slow disks does."""
    conn.execute(
        "create or replace function public.burn() returns trigger language plpgsql as "
        "$$ begin for n in 1..3000 * new.batches loop end loop; return new; end $$"
    )
    conn.execute("drop trigger if exists burn on tidemark.runs")
    conn.execute("create trigger burn before insert on tidemark.runs for each row execute function public.burn()")
    try:
        return hot(conn, url, settings, scale / 4)
    finally:
        conn.execute("drop trigger burn on tidemark.runs")


@contextmanager
def _neighbour(url: str) -> Any:
    waits: list[float] = []
    stop = Event()

    def neighbour() -> None:
        with psycopg.connect(url, autocommit=True) as own:
            while not stop.is_set():
                began = perf_counter()
                with own.transaction():
                    run(own, "lock_partitions", (Int4Array([1]),))
                waits.append(perf_counter() - began)
                sleep(_NEIGHBOUR_EVERY)

    thread = Thread(target=neighbour)
    thread.start()
    try:
        yield waits
    finally:
        stop.set()
        thread.join()


Workload = Callable[[Conn, str, Settings, float], Run]


@dataclass(frozen=True, kw_only=True, slots=True)
class Contest:
    """A workload, and what decides it: a figure, whether more of it is better, how long the neighbour may wait."""

    workload: Workload
    decided_by: str
    more_is_better: bool = False
    neighbour_ms: float = inf


CONTESTS: Mapping[str, Contest] = {
    "deep backlog": Contest(workload=deep, decided_by="events_per_second", more_is_better=True),
    "thin and wide": Contest(workload=thin, decided_by="caught_up_ms"),
    "bursts": Contest(workload=bursts, decided_by="cpu_micros"),
    # The fastest of those that let the neighbour in.
    "one hot partition": Contest(
        workload=hot, decided_by="events_per_second", more_is_better=True, neighbour_ms=_PATIENCE_MS
    ),
    "one hot partition, slow server": Contest(
        workload=slow, decided_by="events_per_second", more_is_better=True, neighbour_ms=_PATIENCE_MS
    ),
}


def measure(conn: Conn, url: str, contest: Contest, rounds: int, scale: float) -> dict[str, list[Run]]:
    """The rounds of each arm; every second one goes backwards."""
    runs: dict[str, list[Run]] = {name: [] for name in ARMS}
    for number in range(rounds):
        for name in list(ARMS)[:: 1 if number % 2 == 0 else -1]:
            runs[name].append(contest.workload(conn, url, ARMS[name], scale))
    return runs


def median(runs: Sequence[Run]) -> Run:
    return Run(**{field: statistics.median(getattr(r, field) for r in runs) for field in Run.__slots__})


def better(contest: Contest, ours: Sequence[Run], theirs: Sequence[Run]) -> list[float]:
    """How many times better we were than they, round by round."""
    ratios = [
        getattr(a, contest.decided_by) / getattr(b, contest.decided_by) for a, b in zip(ours, theirs, strict=True)
    ]
    return ratios if contest.more_is_better else [1 / ratio for ratio in ratios]


def verdict(found: Mapping[str, Sequence[Run]], contest: Contest) -> str:
    """Who wins, if anybody does: nobody is beaten who was not beaten in every round, and by more than noise."""
    fit = [name for name, runs in found.items() if median(runs).neighbour_ms <= contest.neighbour_ms]
    if not fit:
        return "nobody lets the neighbour in"
    best = max(fit, key=lambda name: statistics.median(better(contest, found[name], found["fixed"])))
    level = []
    for name in fit:
        ratios = better(contest, found[best], found[name])
        if min(ratios) <= 1 or statistics.median(ratios) <= 1 + _NOISE:
            level.append(name)
    return f"{best} wins" if level == [best] else f"level: {', '.join(level)}"


def show(console: Console, name: str, contest: Contest, found: Mapping[str, Sequence[Run]]) -> None:
    decided = contest.decided_by + (f", neighbour_ms <= {contest.neighbour_ms:g}" if contest.neighbour_ms < inf else "")
    table = Table(title=f"{name} (decided by {decided}): {verdict(found, contest)}", title_justify="left")
    for column in ("", "better than fixed", *Run.__slots__):
        table.add_column(column, justify="right" if column else "left")
    for arm, runs in found.items():
        ratios = better(contest, runs, found["fixed"])
        compared = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        table.add_row(arm, compared, *(f"{getattr(median(runs), field):,.4g}" for field in Run.__slots__))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    parser.add_argument("--only", choices=CONTESTS, help="this workload alone")
    parser.add_argument("--output", type=Path, default=Path("build/bench/batching.json"), help="default: %(default)s")
    arguments = parser.parse_args()
    # An end by SIGTERM stops the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    console = Console(width=160)
    results: list[dict[str, Any]] = []
    with running_server() as url, psycopg.connect(url, autocommit=True) as conn:
        for name in [arguments.only] if arguments.only else CONTESTS:
            contest = CONTESTS[name]
            found = measure(conn, url, contest, arguments.rounds, 0.25 if arguments.quick else 1.0)
            show(console, name, contest, found)
            results.append(
                {
                    "workload": name,
                    "decided_by": contest.decided_by,
                    "verdict": verdict(found, contest),
                    "better_than_fixed": {arm: better(contest, its, found["fixed"]) for arm, its in found.items()},
                    "arms": {arm: asdict(median(its)) for arm, its in found.items()},
                }
            )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
