"""Both paths against the fastest statement that does as much, and the log that they write."""

from collections.abc import Callable
from functools import partial

from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, run_cold
from tests.benchmarks.hot import run_hot
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Measurement, compared, seconds_for

_BACKLOGS = (
    Backlog(partitions=16, events_each=12_500, group=1),
    Backlog(partitions=10_000, events_each=10, group=2_000),
    Backlog(partitions=100_000, events_each=1, group=2_000),
)
# Batches per object, objects per producer and run.
_COMMITS = ((1, 400), (100, 200), (1_500, 60))


def _commit(bench: Bench, producers: int, commits: int, batches: int, *, limit: bool) -> Sample:
    return run_hot(bench.conn, bench.crew(producers), commits, batches, limit=limit)


def _materialize(bench: Bench, clients: int, backlog: Backlog, *, limit: bool) -> Sample:
    return run_cold(bench.conn, bench.crew(clients), backlog, limit=limit)


def plan_limits(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    plan: list[Measurement] = []

    def add(group: str, scenario: str, run: Callable[..., Sample], seconds: float) -> None:
        arms = {"ours": partial(run, limit=False), "limit": partial(run, limit=True)}
        plan.append(compared(group, scenario, arms, rounds, seconds=seconds))

    for backlog in _BACKLOGS[:1] if quick else _BACKLOGS:
        for clients in (1, 2):
            scenario = f"{backlog.partitions:,} x {backlog.events_each:,}, {clients} connection{'s'[: clients - 1]}"
            add("materialize", scenario, partial(_materialize, bench, clients, backlog), seconds_for(backlog.events))
    for producers in (1, 4):
        for batches, commits in _COMMITS:
            scenario = f"{batches:,} a commit, {producers} producer{'s'[: producers - 1]}"
            run = partial(_commit, bench, producers, commits // (4 if quick else 1), batches)
            add("commit", scenario, run, 0.5 if quick else 1.0)
    return plan
