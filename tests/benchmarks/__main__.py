"""All benchmarks: `python -m tests.benchmarks [--quick] [--only NAME]`; results in build/bench."""

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psycopg
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tests.benchmarks.claims import run_claims
from tests.benchmarks.commits import run_commits
from tests.benchmarks.curves import run_curves
from tests.benchmarks.entry import Entry
from tests.benchmarks.report import markdown, write
from tests.benchmarks.server import running_server
from tests.benchmarks.suite import run_suite


class Part(Protocol):
    def __call__(
        self, url: str, conn: psycopg.Connection, rounds: int, *, quick: bool, tick: Callable[[str], object]
    ) -> list[Entry]: ...


PARTS: dict[str, Part] = {"suite": run_suite, "commit": run_commits, "curves": run_curves, "claims": run_claims}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and smaller sizes; under three minutes")
    parser.add_argument("--only", choices=PARTS, help="this part alone")
    parser.add_argument("--rounds", type=int, help="measurements of each kind (default: 5, or 1 with --quick)")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="default: %(default)s")
    arguments = parser.parse_args()
    # An end by SIGTERM stops the server too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    parts = [arguments.only] if arguments.only else list(PARTS)
    entries: list[Entry] = []
    columns = (TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn())
    with (
        running_server() as url,
        psycopg.connect(url, autocommit=True) as conn,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=len(parts))
        for name in parts:

            def tick(description: str, part: str = name) -> None:
                progress.update(task, description=f"{part}: {description}")

            entries += PARTS[name](url, conn, rounds, quick=arguments.quick, tick=tick)
            # After each part, so that one which is stopped leaves those before it.
            write(entries, arguments.output)
            progress.advance(task)
    print(markdown(entries))  # noqa: T201 -- what this program is for


if __name__ == "__main__":
    main()
