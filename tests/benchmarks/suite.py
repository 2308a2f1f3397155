"""The seed system's scenarios: ours, the baseline at its best and the limit, interleaved on fresh tables."""

from collections.abc import Callable
from dataclasses import replace
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
_SHORT_ROUNDS = 3
# Before the run that is timed: connections, caches and prepared statements are then those of a worker that has been
# running. New statistics void every plan; after a short load none are made, or planning would be most of what is timed.
_REHEARSALS = 6


def _checked(sample: Sample, events: int) -> Sample:
    if sample.units != events:
        raise RuntimeError(f"{sample.units} of {events} events were taken")
    return sample


def ours(conn: Conn, crew: Crew, scenario: Scenario, *, limit: bool) -> Sample:
    job = copy if limit else drain
    partitions = scenario.all_partitions
    # The partitions after the first ones are for warming up.
    fresh(conn, (1 + _REHEARSALS) * partitions)
    if scenario.existing:
        conn.execute("update tidemark.topic_partitions set end_offset = 100000")
    shared = shares(Backlog(partitions=partitions, events_each=0, group=2_000), crew.size)
    for turn in range(1, 1 + _REHEARSALS):
        behind = turn * partitions
        load_random(conn, range(behind + 1, behind + partitions + 1), scenario.rehearsed, scenario.records)
        crew.run(job, [replace(s, first=s.first + behind, last=s.last + behind) for s in shared])
    load_random(conn, range(1, partitions + 1), scenario.events, scenario.records, analyze=not scenario.is_short)
    return _checked(crew.run(job, shared), scenario.events)


def seed(conn: Conn, crew: Crew, scenario: Scenario, *, indexes: system.Indexes, batch: int) -> Sample:
    # Room for the new version of every row beside the old one, which is updated once. Not searched, as the others are.
    system.create(conn, scenario.topics, scenario.partitions, indexes=indexes, fillfactor=50)
    if scenario.existing:
        conn.execute("update seed.topic_partitions set end_offset = 100000")
    work = [system.SeedShare(batch=batch)] * crew.size
    for _ in range(_REHEARSALS):
        system.load(conn, scenario.partitions, scenario.rehearsed, scenario.records)
        crew.run(system.drain, work)
    system.load(conn, scenario.partitions, scenario.events, scenario.records, analyze=not scenario.is_short)
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
                rounds * (_SHORT_ROUNDS if scenario.is_short and not quick else 1),
            )
        note = f"baseline: {best['indexes']} indexes, batches of {best['batch']:,}"
        entries.append(compare("suite", scenario.name, results, note=note))
    return entries
