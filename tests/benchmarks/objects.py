"""Collect and reconcile with many objects: `python -m tests.benchmarks.objects [OBJECTS]`, 1,000,000 by default.

A fifth of the objects is dead, the others are live, and there is an unknown upload for every fifth of them; the store
is a directory of empty files, a thousand in each of its directories. Both tasks take turns of the shipped length until
nothing is left to do. Memory is the peak of this process, which the two tasks must not raise with the number of
objects: compare it with that of a tenth of them.
"""

import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import psycopg
from rich.console import Console

from tasks.app import TidemarkApp
from tasks.cleanup import collect, reconcile
from tests.benchmarks.server import running_server
from tests.benchmarks.tables import TX
from tests.support_commands import app_for

_A_DIRECTORY = 1_000
# Nobody answers there: the tasks work without a broker.
_NOBODY = "redis://127.0.0.1:1/0"


def fill(root: Path, objects: int) -> int:
    """Uploads of all objects, and an unknown one for every fifth; returns how many."""
    uploads = 0
    for first in range(0, objects, _A_DIRECTORY):
        directory = root / f"{first // _A_DIRECTORY:05}"
        directory.mkdir()
        for number in range(first, min(first + _A_DIRECTORY, objects)):
            names = [f"{number:08}", f"{number:08}-unknown"][: 1 + (number % 5 == 1)]
            for name in names:
                (directory / name).touch()
            uploads += len(names)
    return uploads


def load(conn: psycopg.Connection[Any], objects: int) -> None:
    """The rows: every fifth object is dead, and has lost its one batch."""
    conn.execute(
        f"insert into tidemark.objects (tx, key, content_hash, batches, partition_ids, batch_counts) "
        f"select {TX}, format('%s/%s', lpad((n / {_A_DIRECTORY})::text, 5, '0'), lpad(n::text, 8, '0')), '\\x01', 1, "
        f"'{{1}}', '{{1}}' from generate_series(0, {objects - 1}) n".encode()
    )
    conn.execute(
        "insert into tidemark.deleted_batches (object_id, tx, batches) "
        "select id, tx, 1 from tidemark.objects where right(key, 1) in ('0', '5')"
    )
    conn.execute("insert into tidemark.dead_objects (object_id) select object_id from tidemark.deleted_batches")
    conn.execute("vacuum analyze")


def measure(
    console: Console,
    app: TidemarkApp,
    task: Callable[[TidemarkApp], dict[str, Any]],
    done: Callable[[dict[str, Any]], bool],
) -> None:
    """Turns of a task until it has nothing left to do; prints what they did and took."""
    turns, total, began, worked = 0, dict[str, int](), perf_counter(), process_time()
    while True:
        result = task(app)
        turns += 1
        for name, value in result.items():
            if type(value) is int:
                total[name] = total.get(name, 0) + value
        if done(result):
            break
    seconds = f"{perf_counter() - began:.1f} s (CPU of this process {process_time() - worked:.1f} s)"
    said = ", ".join(f"{name} {value:,}" for name, value in total.items() if value)
    console.print(f"{task.__name__}: {seconds} in {turns} turns, {said}; peak RSS {peak():.0f} MiB")


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(objects: int) -> None:
    console = Console(width=160, highlight=False)
    with (
        tempfile.TemporaryDirectory(prefix="tidemark-objects-") as directory,
        running_server({"autovacuum": "on"}) as url,
        psycopg.connect(url, autocommit=True) as conn,
    ):
        began = perf_counter()
        uploads = fill(Path(directory), objects)
        load(conn, objects)
        made = f"{objects:,} rows and {uploads:,} files, made in {perf_counter() - began:.0f} s"
        console.print(f"{made}; RSS {peak():.0f} MiB")
        changes = {"object_store": f"file://{directory}", "object_grace_seconds": 0.001, "object_ttl_seconds": 0.001}
        with app_for(url, _NOBODY, **changes) as app:
            measure(console, app, reconcile, lambda result: result["complete"])
            measure(console, app, collect, lambda result: result["deleted"] == 0)
            measure(console, app, reconcile, lambda result: result["complete"])
        left = sum(1 for _ in Path(directory).glob("*/*"))
        row = conn.execute("select count(*) from tidemark.objects").fetchone()
        console.print(f"left: {left:,} files, {row[0] if row else 0:,} rows")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
