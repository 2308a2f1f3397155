"""The page's seventh claim: the configuration that is shipped, beside what PostgreSQL sets by itself."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks.bench import Bench
from tests.benchmarks.cold import Backlog, drain, shares
from tests.benchmarks.crew import Crew
from tests.benchmarks.entry import Entry, compare
from tests.benchmarks.measure import Sample, interleave
from tests.benchmarks.plan import Measurement, Tick, seconds_for
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import fresh, history, load, wal_position

_GROUP = "claim 7"
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
_ARMS = ("ours", "baseline")


class _Trial:
    """One backlog on both servers, on a log that has `batches` already, right after a checkpoint."""

    def __init__(self, bench: Bench, backlog: Backlog, batches: int) -> None:
        self._bench = bench
        self._backlog = backlog
        self._batches = batches
        self._log: dict[str, list[float]] = {name: [] for name in _ARMS}

    def arm(self, name: str) -> Sample:
        bench, backlog = self._bench, self._backlog
        conn, crew = (bench.conn, bench.crew(1)) if name == "ours" else bench.keep("default server", _default_server)
        fresh(conn, backlog.partitions)
        if self._batches:
            history(conn, backlog.partitions, self._batches)
        load(conn, backlog.partitions, backlog.events_each)
        before = wal_position(conn)
        sample = crew.run(drain, shares(backlog, crew.size))
        self._log[name].append((wal_position(conn) - before) / sample.units)
        return sample

    def entries(self, scenario: str, rounds: int, tick: Tick) -> list[Entry]:
        results = interleave({name: partial(self.arm, name) for name in _ARMS}, rounds, tick=tick)
        written = " / ".join(f"{statistics.median(self._log[name]):,.0f}" for name in _ARMS)
        return [compare(_GROUP, scenario, results, note=f"with / without; log: {written} bytes an event")]


def plan_configuration(bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]:
    deep = Backlog(partitions=16, events_each=6_250, group=1)
    wide = Backlog(partitions=10_000, events_each=10, group=2_000)
    plan = []
    for what, backlog, batches in (("deep", deep, 0), ("wide", wide, 50_000 if quick else 500_000)):
        scenario = f"7 configuration: shipped or default, {what}"
        plan.append(
            Measurement(
                group=_GROUP,
                scenario=scenario,
                runs=len(_ARMS) * rounds,
                seconds=seconds_for(backlog.events + batches),
                take=partial(_Trial(bench, backlog, batches).entries, scenario, rounds),
            )
        )
    return plan


@contextmanager
def _default_server() -> Iterator[tuple[psycopg.Connection[Any], Crew]]:
    with (
        running_server(_DEFAULTS) as url,
        psycopg.connect(url, autocommit=True) as conn,
        Crew(url, 1) as crew,
    ):
        yield conn, crew
