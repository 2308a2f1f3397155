"""The page's seventh claim: the configuration that is shipped, beside what PostgreSQL sets by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, run_cold
from tests.benchmarks.crew import Crew
from tests.benchmarks.measure import Sample
from tests.benchmarks.plan import Measurement, compared, seconds_for
from tests.benchmarks.server import running_server

_DEFAULTS = {
    "shared_buffers": "128MB",
    "effective_cache_size": "4GB",
    "work_mem": "4MB",
    "maintenance_work_mem": "64MB",
    "max_wal_size": "1GB",
    "min_wal_size": "80MB",
    "checkpoint_timeout": "5min",
    "wal_compression": "off",
    "jit": "on",
    "random_page_cost": "4",
}


def _run(bench: Bench, backlog: Backlog, batches: int, *, shipped: bool) -> Sample:
    """One backlog on either server, on a log that has `batches` already, right after a checkpoint."""
    conn, crew = (bench.conn, bench.crew(1)) if shipped else bench.keep("default server", _default_server)
    return run_cold(conn, crew, backlog, limit=False, history=batches)


def plan_configuration(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    deep = Backlog(partitions=16, events_each=6_250, group=1)
    wide = Backlog(partitions=10_000, events_each=10, group=2_000)
    plan = []
    for what, backlog, batches in (("deep", deep, 0), ("wide", wide, 50_000 if quick else 500_000)):
        run = partial(_run, bench, backlog, batches)
        arms = {"ours": partial(run, shipped=True), "baseline": partial(run, shipped=False)}
        scenario = f"7 configuration: shipped or default, {what}"
        seconds = seconds_for(backlog.events + batches)
        plan.append(compared("claim 7", scenario, arms, rounds, seconds=seconds, note="with / without"))
    return plan


@contextmanager
def _default_server() -> Iterator[tuple[psycopg.Connection[Any], Crew]]:
    with (
        running_server(_DEFAULTS) as url,
        psycopg.connect(url, autocommit=True) as conn,
        Crew(url, 1) as crew,
    ):
        yield conn, crew
