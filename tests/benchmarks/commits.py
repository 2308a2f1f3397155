"""The hot path against a bare insert."""

from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks.crew import Crew
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.hot import run_hot
from tests.benchmarks.measure import interleave

COMMITS = ((1, 400), (100, 200), (1_500, 60))


def run_commits(
    url: str, conn: psycopg.Connection[Any], rounds: int, *, quick: bool, tick: Callable[[str], object]
) -> list[Entry]:
    entries: list[Entry] = []
    for producers in (1, 4):
        for batches, commits in COMMITS:
            tick(f"commits of {batches:,}")
            with Crew(url, producers) as crew:
                arms = {
                    "ours": partial(run_hot, conn, crew, commits // (4 if quick else 1), batches, limit=False),
                    "limit": partial(run_hot, conn, crew, commits // (4 if quick else 1), batches, limit=True),
                }
                entries.append(
                    compare("commit", f"{batches:,} a commit, {producers} producers", interleave(arms, rounds))
                )
    return entries
