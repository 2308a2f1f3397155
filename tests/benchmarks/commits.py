"""The hot path against a bare insert."""

from functools import partial

from tests.benchmarks.bench import Bench
from tests.benchmarks.hot import run_hot
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Measurement, compared

COMMITS = ((1, 400), (100, 200), (1_500, 60))


def _run(bench: Bench, producers: int, commits: int, batches: int, *, limit: bool) -> Sample:
    return run_hot(bench.conn, bench.crew(producers), commits, batches, limit=limit)


def plan_commits(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    plan: list[Measurement] = []
    for producers in (1, 4):
        for batches, commits in COMMITS:
            run = partial(_run, bench, producers, commits // (4 if quick else 1), batches)
            arms = {"ours": partial(run, limit=False), "limit": partial(run, limit=True)}
            scenario = f"{batches:,} a commit, {producers} producer{'s'[: producers - 1]}"
            plan.append(compared("commit", scenario, arms, rounds, seconds=0.5 if quick else 1.0))
    return plan
