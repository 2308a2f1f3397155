"""`celery -A tasks workers`: which workers are up, what they serve and what they do."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import click
from rich.console import Console

from config.queues import all_queues, shard_of_queue
from tasks.commands.base import Server, app_of, command, echo_csv, echo_json, output_options, reaching
from tasks.commands.display import NOTHING, console, duration, label, number, table, text
from tasks.commands.parameters import Seconds
from tasks.names import ranges

_REPLY_SECONDS = 5.0
_CSV = ("worker", "pid", "slots", "shards", "other_queues", "tasks", "running", "uptime_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class Worker:
    """A worker that answered.

    `active` are the tasks that run, with their arguments as Flower shows them and for how many seconds; `processed`
    counts tasks by name since it started.
    """

    name: str
    pid: int | None
    uptime: float | None
    concurrency: int | None
    queues: list[str]
    active: list[dict[str, Any]]
    processed: dict[str, int]


@command("workers")
@click.option(
    "--timeout",
    type=Seconds(0.1, 60),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="Workers that do not answer within this time count as down.",
)
@output_options
def workers(ctx: click.Context, timeout: float, output: str | None) -> None:
    """List the workers that are up, and what they do.

    Exit code 1 when no worker answers, or a queue has no worker.
    """
    found = _ask(ctx, timeout)
    unserved = sorted({*all_queues(app_of(ctx).settings.shards)} - {q for w in found for q in w.queues}, key=_by_shard)
    if output == "json":
        rows = [{**asdict(w), "shards": _split(w.queues)[0]} for w in found]
        echo_json({"workers": rows, "unserved_queues": unserved})
    elif output == "csv":
        echo_csv(_CSV, map(_row, found))
    else:
        _show(console(ctx), found, unserved, timeout)
    if not found or unserved:
        ctx.exit(1)


def _split(queues: Iterable[str]) -> tuple[list[int], list[str]]:
    """The shards, and the queues that are no shard's."""
    by_queue = {queue: shard_of_queue(queue) for queue in queues}
    return sorted(s for s in by_queue.values() if s is not None), sorted(q for q, s in by_queue.items() if s is None)


def _row(worker: Worker) -> dict[str, Any]:
    shards, others = _split(worker.queues)
    return {
        "worker": worker.name,
        "pid": worker.pid,
        "slots": worker.concurrency,
        "shards": ranges(shards) if shards else "",
        "other_queues": ",".join(others),
        "tasks": sum(worker.processed.values()),
        "running": len(worker.active),
        "uptime_seconds": worker.uptime,
    }


def _ask(ctx: click.Context, timeout: float) -> list[Worker]:
    app = app_of(ctx)
    with app.connection_for_read() as connection:
        # Fails at once where the broker is away; a broadcast would go on trying.
        with reaching(ctx, Server.BROKER):
            connection.ensure_connection(max_retries=1)
        stats: dict[str, dict[str, Any]] = app.control.inspect(timeout=timeout, connection=connection).stats() or {}
        if not stats:
            return []
        # Who they are is known: no need to wait for more than their answers.
        known = app.control.inspect(
            destination=list(stats), limit=len(stats), timeout=max(timeout, _REPLY_SECONDS), connection=connection
        )
        queues = known.active_queues() or {}
        active = known.active() or {}
    return [
        Worker(
            name=name,
            pid=told.get("pid"),
            uptime=told.get("uptime"),
            concurrency=(told.get("pool") or {}).get("max-concurrency"),
            queues=sorted((q["name"] for q in queues.get(name) or ()), key=_by_shard),
            active=[_active(task) for task in active.get(name) or ()],
            processed=dict(sorted((told.get("total") or {}).items())),
        )
        for name, told in sorted(stats.items())
    ]


def _active(task: dict[str, Any]) -> dict[str, Any]:
    started = task.get("time_start")
    return {
        "id": str(task.get("id")),
        "name": str(task.get("name")),
        "arguments": str(task.get("kwargs") if task.get("args") in (None, "()", [], ()) else task.get("args")),
        "running": None if started is None else max(0.0, time.time() - float(started)),
    }


def _by_shard(queue: str) -> tuple[bool, int, str]:
    shard = shard_of_queue(queue)
    return shard is None, shard or 0, queue


def _show(out: Console, found: list[Worker], unserved: list[str], timeout: float) -> None:
    if not found:
        out.print(text(f"no worker answered within {duration(timeout)}; start one: celery -A tasks worker", "bold red"))
        return
    rows = table("Worker", ">Slots", "Shards", "Other queues", ">Tasks", ">Up for")
    for worker in found:
        shards, others = _split(worker.queues)
        rows.add_row(
            label(worker.name),
            NOTHING if worker.concurrency is None else str(worker.concurrency),
            ranges(shards) if shards else NOTHING,
            label(", ".join(others) or NOTHING),
            number(sum(worker.processed.values())),
            duration(worker.uptime),
        )
    out.print(rows)
    busy = [(worker, task) for worker in found for task in worker.active]
    if busy:
        out.print()
        rows = table("Runs now", "Task", "Arguments", ">For")
        for worker, task in busy:
            arguments = text(task["arguments"][:200])
            rows.add_row(label(worker.name), label(task["name"]), arguments, duration(task["running"]))
        out.print(rows)
    if unserved:
        out.print()
        shards, others = _split(unserved)
        missing = [f"shards {ranges(shards)}"] * bool(shards) + others
        out.print(text(f"without a worker: {', '.join(missing)}", "bold red"))
