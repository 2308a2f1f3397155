"""The seed system's scenarios: ours, the baseline at its best and the limit, interleaved on fresh tables."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks.baseline import system
from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, drain, shares, summarize
from tests.benchmarks.crew import Crew
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Sample, interleave
from tests.benchmarks.plan import Measurement, Tick
from tests.benchmarks.scenarios import SCENARIOS, Scenario
from tests.benchmarks.tables import begin_at, fresh, load_random

Conn = psycopg.Connection[Any]
# A run of a hundred events takes milliseconds: more of them, for a median that means something.
_SHORT_ROUNDS = 3
# Before the run that is timed: connections, caches and prepared statements are then those of a worker that has been
# running. New statistics void every plan; after a short load none are made, or planning would be most of what is timed.
_REHEARSALS = 6
_QUICK_EVENTS = 10_000
_ARMS = ("ours", "baseline", "limit")


def _checked(sample: Sample, events: int) -> Sample:
    if sample.units != events:
        raise RuntimeError(f"{sample.units} of {events} events were taken")
    return sample


def ours(conn: Conn, crew: Crew, scenario: Scenario, *, limit: bool) -> Sample:
    job = summarize if limit else drain
    partitions = scenario.all_partitions
    # The partitions after the first ones are for warming up.
    fresh(conn, (1 + _REHEARSALS) * partitions)
    if scenario.existing:
        begin_at(conn, 100_000)
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


def candidates(scenario: Scenario, *, quick: bool) -> list[tuple[system.Indexes, int]]:
    """The indexes and batch sizes among which the baseline has its best."""
    batches = (
        {scenario.batch} if quick else {scenario.batch, 2_000, scenario.events // scenario.workers, scenario.events}
    )
    kinds: tuple[system.Indexes, ...] = ("page", "partial") if quick else ("bare", "page", "partial")
    return [(indexes, batch) for indexes in kinds for batch in sorted(batches)]


def _best(conn: Conn, crew: Crew, scenario: Scenario, tick: Tick, *, quick: bool) -> tuple[system.Indexes, int]:
    """The baseline's best indexes and batch size for a scenario, by trying each."""
    rates: dict[tuple[system.Indexes, int], float] = {}
    for indexes, batch in candidates(scenario, quick=quick):
        sample = seed(conn, crew, scenario, indexes=indexes, batch=batch)
        rates[indexes, batch] = sample.units / sample.seconds
        tick()
    return max(rates, key=lambda key: rates[key])


def _planned(bench: Bench, scenario: Scenario, rounds: int, *, quick: bool) -> Measurement:
    rounds *= _SHORT_ROUNDS if scenario.is_short and not quick else 1

    def take(tick: Tick) -> list[Entry]:
        conn = bench.conn
        # A crew of its own has made no plans for another scenario. With --quick starting processes would take longer
        # than what they measure.
        kept = nullcontext(bench.crew(scenario.workers)) if quick else Crew(bench.url, scenario.workers)
        with kept as crew:
            indexes, batch = _best(conn, crew, scenario, tick, quick=quick)
            arms = {
                "ours": partial(ours, conn, crew, scenario, limit=False),
                "baseline": partial(seed, conn, crew, scenario, indexes=indexes, batch=batch),
                "limit": partial(ours, conn, crew, scenario, limit=True),
            }
            results = interleave(arms, rounds, tick=tick)
        note = f"baseline: {indexes} indexes, batches of {batch:,}"
        return [compare("suite", scenario.name, results, note=note)]

    return Measurement(
        group="suite",
        scenario=scenario.name,
        runs=len(candidates(scenario, quick=quick)) + len(_ARMS) * rounds,
        # The baseline's runs are most of it.
        seconds=0.25 + scenario.events / 30_000,
        take=take,
    )


def plan_suite(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    scenarios = [replace(s, events=min(s.events, _QUICK_EVENTS)) for s in SCENARIOS] if quick else SCENARIOS
    return [_planned(bench, scenario, rounds, quick=quick) for scenario in scenarios]
