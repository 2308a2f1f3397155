"""How throughput changes as things grow."""

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import psycopg

from db.commit import commit_object
from db.discover import find_committed, save_seen
from tests.benchmarks.cold import Backlog, copy, drain, run_cold, shares
from tests.benchmarks.crew import Crew, cpu_seconds
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Sample, interleave
from tests.benchmarks.tables import fresh, history, load

Conn = psycopg.Connection[Any]
_ACTIVE = 100
_FAN_OUTS = 20


def _pair(conn: Conn, crew: Crew, backlog: Backlog, rounds: int) -> dict[str, Any]:
    return interleave(
        {
            "ours": partial(run_cold, conn, crew, backlog, limit=False),
            "limit": partial(run_cold, conn, crew, backlog, limit=True),
        },
        rounds,
    )


def _aged(conn: Conn, crew: Crew, batches: int, backlog: Backlog, *, limit: bool) -> Sample:
    fresh(conn, backlog.partitions)
    history(conn, backlog.partitions, batches)
    load(conn, backlog.partitions, backlog.events_each)
    return crew.run(copy if limit else drain, shares(backlog, crew.size))


def _fan_out(conn: Conn, partitions: int) -> Sample:
    """Fan-outs after 100 commits to 100 partitions among `partitions`; a unit is one fan-out."""
    fresh(conn, partitions)
    step = partitions // _ACTIVE
    ids = [n * step + 1 for n in range(_ACTIVE)]
    seconds = cpu = 0.0
    for turn in range(_FAN_OUTS):
        for number in range(_ACTIVE):
            commit_object(conn, f"object {turn} {number}", [ids[number]], [1], [0], [1], [0])
        before, begin = cpu_seconds(conn), perf_counter()
        found = find_committed(conn)
        save_seen(conn, found.snapshot)
        seconds += perf_counter() - begin
        cpu += cpu_seconds(conn) - before
        if len(found.partitions) != _ACTIVE:
            raise RuntimeError(f"{len(found.partitions)} of {_ACTIVE} partitions were found")
    return Sample(seconds=seconds, cpu_seconds=cpu, units=_FAN_OUTS)


def run_curves(url: str, conn: Conn, rounds: int, *, quick: bool, tick: Callable[[str], object]) -> list[Entry]:
    entries: list[Entry] = []
    with Crew(url, 1) as crew:
        for events in (1_000, 100_000) if quick else (1_000, 10_000, 100_000, 1_000_000):
            tick(f"backlog of {events:,}")
            backlog = Backlog(partitions=16, events_each=events // 16, group=1)
            entries.append(compare("backlog", f"{events:,} events", _pair(conn, crew, backlog, rounds), x=events))
        for partitions in (1, 10_000) if quick else (1, 100, 10_000, 100_000):
            tick(f"{partitions:,} partitions")
            backlog = Backlog(partitions=partitions, events_each=200_000 // partitions, group=2_000)
            entries.append(
                compare("partitions", f"{partitions:,} partitions", _pair(conn, crew, backlog, rounds), x=partitions)
            )
        backlog = Backlog(partitions=16, events_each=6_250, group=1)
        for batches in (0, 200_000) if quick else (0, 1_000_000, 5_000_000):
            tick(f"history of {batches:,}")
            results = interleave(
                {
                    "ours": partial(_aged, conn, crew, batches, backlog, limit=False),
                    "limit": partial(_aged, conn, crew, batches, backlog, limit=True),
                },
                rounds,
            )
            entries.append(compare("history", f"{batches:,} batches", results, x=batches))
    for workers in (1, 2) if quick else (1, 2, 4, 8):
        tick(f"{workers} workers")
        with Crew(url, workers) as crew:
            results = _pair(conn, crew, Backlog(partitions=16, events_each=12_500, group=1), rounds)
        entries.append(compare("workers", f"{workers} workers", results, x=workers))
    for partitions in (1_000, 100_000):
        tick(f"fan-out over {partitions:,}")
        results = interleave({"ours": partial(_fan_out, conn, partitions)}, rounds)
        scenario = f"fan-out, {partitions:,} partitions, {_ACTIVE} active"
        entries.append(compare("fan-out", scenario, results, x=partitions, unit="fan-outs/s"))
    return entries
