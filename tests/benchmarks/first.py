"""A first measurement: `python -m tests.benchmarks.first [--rounds N]`. Ratios of interleaved runs, medians."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import psycopg

from tests.benchmarks.cold import Backlog, drain, run_cold, shares
from tests.benchmarks.crew import Crew
from tests.benchmarks.hot import PARTITIONS, Production, produce, run_hot
from tests.benchmarks.measure import Result, Sample, interleave, share
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import fresh, load, wal_position

DEEP = Backlog(partitions=16, events_each=12_500, group=1)
THIN = Backlog(partitions=10_000, events_each=10, group=2_000)

# Batches per object, objects per producer and run.
COMMITS = ((1, 400), (100, 200), (1_500, 60))

_ROW = "{:<36} {:>11} {:>11} {:>7} {:>11}"


def _print_pair(name: str, results: dict[str, Result]) -> None:
    ours, limit = results["ours"], results["limit"]
    print(  # noqa: T201 -- what this program is for
        _ROW.format(
            name,
            f"{ours.rate:,.0f}",
            f"{limit.rate:,.0f}",
            f"{share(ours, limit):.2f}",
            f"{limit.cpu_micros / ours.cpu_micros:.2f}",
        )
    )


def _pair(run: Callable[..., Sample], rounds: int) -> dict[str, Result]:
    return interleave({"ours": partial(run, limit=False), "limit": partial(run, limit=True)}, rounds)


def _wal(conn: psycopg.Connection[Any]) -> None:
    """Bytes of log per event; nothing else runs on this server."""
    for batches, commits in COMMITS:
        fresh(conn, PARTITIONS)
        before = wal_position(conn)
        events = produce(conn, Production(producer=0, commits=commits, batches=batches))
        print(f"{f'commit, {batches:,} a commit':<36} {(wal_position(conn) - before) / events:>11,.0f}")  # noqa: T201
    for name, backlog in (("16 partitions", DEEP), ("10,000 partitions x 10", THIN)):
        fresh(conn, backlog.partitions)
        load(conn, backlog.partitions, backlog.events_each)
        before = wal_position(conn)
        events = drain(conn, shares(backlog, 1)[0])
        print(f"{f'materialize, {name}':<36} {(wal_position(conn) - before) / events:>11,.0f}")  # noqa: T201


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each kind (default: %(default)s)")
    rounds = parser.parse_args().rounds
    with running_server() as url, psycopg.connect(url, autocommit=True) as conn:
        print(_ROW.format("materialize", "events/s", "limit", "share", "of CPU time"))  # noqa: T201
        for name, backlog in (("16 partitions x 12,500", DEEP), ("10,000 partitions x 10", THIN)):
            for clients in (1, 2):
                with Crew(url, clients) as crew:
                    results = _pair(partial(run_cold, conn, crew, backlog), rounds)
                _print_pair(f"{name}, {clients} connection{'s'[: clients - 1]}", results)
        print(_ROW.format("\ncommit", "batches/s", "limit", "share", "of CPU time"))  # noqa: T201
        for clients in (1, 4):
            for batches, commits in COMMITS:
                with Crew(url, clients) as crew:
                    results = _pair(partial(run_hot, conn, crew, commits, batches), rounds)
                _print_pair(f"{batches:,} a commit, {clients} producer{'s'[: clients - 1]}", results)
        print(f"\n{'log written':<36} {'bytes/event':>11}")  # noqa: T201
        _wal(conn)


if __name__ == "__main__":
    main()
