"""How throughput changes as things grow."""

from collections.abc import Callable
from functools import partial
from time import perf_counter

from db.commit import commit_object
from db.discover import find_committed, save_fan_out
from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, run_cold
from tests.benchmarks.crew import cpu_seconds
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Measurement, compared, seconds_for
from tests.benchmarks.tables import fresh

_ACTIVE = 100
_FAN_OUTS = 20


def _run(bench: Bench, workers: int, backlog: Backlog, *, limit: bool, history: int = 0) -> Sample:
    return run_cold(bench.conn, bench.crew(workers), backlog, limit=limit, history=history)


def _fan_out(bench: Bench, partitions: int) -> Sample:
    """Fan-outs after 100 commits to 100 partitions among `partitions`; a unit is one fan-out."""
    conn = bench.conn
    fresh(conn, partitions)
    step = partitions // _ACTIVE
    ids = [n * step + 1 for n in range(_ACTIVE)]
    seconds = cpu = 0.0
    for turn in range(_FAN_OUTS):
        for number in range(_ACTIVE):
            commit_object(conn, f"object {turn} {number}", [ids[number]], [1], [0], [1], [0])
        before, begin = cpu_seconds(conn), perf_counter()
        found = find_committed(conn)
        save_fan_out(conn, found)
        seconds += perf_counter() - begin
        cpu += cpu_seconds(conn) - before
        if len(found.partitions) != _ACTIVE:
            raise RuntimeError(f"{len(found.partitions)} of {_ACTIVE} partitions were found")
    return Sample(seconds=seconds, cpu_seconds=cpu, units=_FAN_OUTS)


def plan_curves(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    plan: list[Measurement] = []

    def pair(group: str, scenario: str, x: int, run: Callable[..., Sample], seconds: float) -> None:
        arms = {"ours": partial(run, limit=False), "limit": partial(run, limit=True)}
        plan.append(compared(group, scenario, arms, rounds, seconds=seconds, x=x))

    for events in (1_000, 100_000) if quick else (1_000, 10_000, 100_000, 1_000_000):
        backlog = Backlog(partitions=16, events_each=events // 16, group=1)
        pair("backlog", f"{events:,} events", events, partial(_run, bench, 1, backlog), seconds_for(events))
    total = 100_000 if quick else 200_000
    for partitions in (1, 10_000) if quick else (1, 100, 10_000, 100_000):
        backlog = Backlog(partitions=partitions, events_each=total // partitions, group=2_000)
        seconds = seconds_for(total + partitions)
        name = f"{partitions:,} partition{'s'[: partitions - 1]}"
        pair("partitions", name, partitions, partial(_run, bench, 1, backlog), seconds)
    backlog = Backlog(partitions=16, events_each=6_250, group=1)
    for batches in (16_000, 200_000) if quick else (16_000, 1_000_000, 5_000_000):
        arms = {
            "ours": partial(_run, bench, 1, backlog, limit=False, history=batches),
            "baseline": partial(_run, bench, 1, backlog, limit=False),
        }
        seconds = seconds_for(backlog.events + batches)
        name = f"{batches:,} batches"
        plan.append(compared("history", name, arms, rounds, seconds=seconds, x=batches, note="baseline: no history"))
    backlog = Backlog(partitions=16, events_each=total // 16, group=1)
    for workers in (1, 2) if quick else (1, 2, 4, 8):
        name = f"{workers} worker{'s'[: workers - 1]}"
        pair("workers", name, workers, partial(_run, bench, workers, backlog), seconds_for(total))
    for partitions in (1_000, 100_000):
        scenario = f"fan-out, {partitions:,} partitions, {_ACTIVE} active"
        arms = {"ours": partial(_fan_out, bench, partitions)}
        plan.append(compared("fan-out", scenario, arms, rounds, seconds=4.0, x=partitions, unit="fan-outs/s"))
    return plan
