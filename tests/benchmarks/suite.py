"""The seed system's scenarios: ours, the baseline at its best and the limit, interleaved on fresh tables."""

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks.baseline import system
from tests.benchmarks.cold import Backlog, copy, drain, shares
from tests.benchmarks.crew import Crew
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Sample, interleave
from tests.benchmarks.scenarios import SCENARIOS, Scenario
from tests.benchmarks.tables import fresh, load_random

Conn = psycopg.Connection[Any]
# A run of a hundred events takes milliseconds: more of them, for a median that means something.
_SHORT_RUN, _SHORT_ROUNDS = 5_000, 3


def _checked(sample: Sample, events: int) -> Sample:
    if sample.units != events:
        raise RuntimeError(f"{sample.units} of {events} events were taken")
    return sample


def _warm(crew: Crew, job: Callable[[Conn, Any], int], arguments: list[Any]) -> None:
    """Run on empty tables: connections, caches and prepared statements are those of a worker that has been running."""
    for _ in range(6):
        crew.run(job, arguments)


def ours(conn: Conn, crew: Crew, scenario: Scenario, *, limit: bool) -> Sample:
    backlog = Backlog(partitions=scenario.all_partitions, events_each=0, group=2_000)
    fresh(conn, scenario.all_partitions)
    if scenario.existing:
        conn.execute("update tidemark.topic_partitions set end_offset = 100000")
    work = shares(backlog, crew.size)
    _warm(crew, copy if limit else drain, work)
    load_random(conn, scenario.all_partitions, scenario.events, scenario.records)
    return _checked(crew.run(copy if limit else drain, work), scenario.events)


def seed(conn: Conn, crew: Crew, scenario: Scenario, *, indexes: system.Indexes, batch: int) -> Sample:
    # Room for the new version of every row beside the old one, which is updated once. Not searched, as the others are.
    system.create(conn, scenario.topics, scenario.partitions, indexes=indexes, fillfactor=50)
    if scenario.existing:
        conn.execute("update seed.topic_partitions set end_offset = 100000")
    work = [system.SeedShare(batch=batch)] * crew.size
    _warm(crew, system.drain, work)
    system.load(conn, scenario.partitions, scenario.events, scenario.records)
    return _checked(crew.run(system.drain, work), scenario.events)


def _best(conn: Conn, crew: Crew, scenario: Scenario, *, quick: bool) -> dict[str, Any]:
    """The baseline's best indexes and batch size for a scenario, by trying each."""
    batches = {scenario.batch} if quick else {scenario.batch, 2_000, scenario.events // crew.size, scenario.events}
    rates: dict[tuple[system.Indexes, int], float] = {}
    kinds: tuple[system.Indexes, ...] = ("page", "partial") if quick else ("bare", "page", "partial")
    for indexes in kinds:
        for batch in sorted(batches):
            sample = seed(conn, crew, scenario, indexes=indexes, batch=batch)
            rates[indexes, batch] = sample.units / sample.seconds
    indexes, batch = max(rates, key=lambda key: rates[key])
    return {"indexes": indexes, "batch": batch}


def run_suite(url: str, conn: Conn, rounds: int, *, quick: bool, tick: Callable[[str], object]) -> list[Entry]:
    entries: list[Entry] = []
    for scenario in SCENARIOS:
        tick(scenario.name)
        with Crew(url, scenario.workers) as crew:
            best = _best(conn, crew, scenario, quick=quick)
            results = interleave(
                {
                    "ours": partial(ours, conn, crew, scenario, limit=False),
                    "baseline": partial(seed, conn, crew, scenario, **best),
                    "limit": partial(ours, conn, crew, scenario, limit=True),
                },
                rounds * (_SHORT_ROUNDS if scenario.events <= _SHORT_RUN and not quick else 1),
            )
        note = f"baseline: {best['indexes']} indexes, batches of {best['batch']:,}"
        entries.append(compare("suite", scenario.name, results, note=note))
    return entries
