"""`celery -A tasks workers`: which workers are up, what they serve and what they do."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

import click
from rich.console import Group, RenderableType

from config.queues import all_queues, shard_of_queue, shard_queue
from tasks.commands.base import CSV, JSON, Server, answer, app_of, command, reaching
from tasks.commands.display import NOTHING, duration, label, number, table, text
from tasks.commands.parameters import Seconds
from tasks.names import ranges

_REPLY_SECONDS = 5.0
_CSV = ("worker", "pid", "slots", "shards", "other_queues", "tasks", "running", "uptime_seconds")


@command("workers", JSON, CSV)
@click.option(
    "--timeout", type=Seconds(0.1, 60), default=1.0, help="Workers that do not answer within this time count as down."
)
def workers(ctx: click.Context, timeout: float) -> None:
    """List the workers that are up, and what they do.

    Exit code 1 when no worker answers, or a queue has no worker.
    """
    found = _ask(ctx, timeout)
    queues = {queue for worker in found for queue in worker["queues"]}
    unserved = [queue for queue in all_queues(app_of(ctx).settings.shards) if queue not in queues]
    words = Group(*_show(found, unserved, timeout))
    answer(ctx, {"workers": found, "unserved_queues": unserved}, words, csv=(_CSV, map(_row, found)))
    if not found or unserved:
        ctx.exit(1)


def _shards(queues: Iterable[str]) -> list[int]:
    return sorted(s for s in map(shard_of_queue, queues) if s is not None)


def _others(queues: Iterable[str]) -> list[str]:
    return sorted(q for q in queues if shard_of_queue(q) is None)


def _row(worker: dict[str, Any]) -> dict[str, Any]:
    return {
        "worker": worker["name"],
        "pid": worker["pid"],
        "slots": worker["concurrency"],
        "shards": ranges(worker["shards"]),
        "other_queues": ",".join(_others(worker["queues"])),
        "tasks": sum(worker["processed"].values()),
        "running": len(worker["active"]),
        "uptime_seconds": worker["uptime"],
    }


def _ask(ctx: click.Context, timeout: float) -> list[dict[str, Any]]:
    """The workers that answer, as JSON shows them: `processed` counts tasks by name since it started."""
    app = app_of(ctx)
    with app.connection_for_read() as connection:
        # Fails at once where the broker is away; a broadcast would go on trying.
        with reaching(ctx, Server.BROKER):
            connection.ensure_connection(max_retries=1)
        stats: dict[str, dict[str, Any]] = app.control.inspect(timeout=timeout, connection=connection).stats() or {}
        if not stats:
            return []
        # Who they are is known: no need to wait for more than their answers.
        limits = {"limit": len(stats), "timeout": max(timeout, _REPLY_SECONDS)}
        known = app.control.inspect(destination=list(stats), connection=connection, **limits)
        queues = known.active_queues() or {}
        served = {name: [queue["name"] for queue in queues.get(name) or ()] for name in stats}
        active = known.active() or {}
    return [
        {
            "name": name,
            "pid": told.get("pid"),
            "uptime": told.get("uptime"),
            "concurrency": (told.get("pool") or {}).get("max-concurrency"),
            "queues": [*map(shard_queue, shards := _shards(served[name])), *_others(served[name])],
            "active": [_active(task) for task in active.get(name) or ()],
            "processed": dict(sorted((told.get("total") or {}).items())),
            "shards": shards,
        }
        for name, told in sorted(stats.items())
    ]


def _active(task: dict[str, Any]) -> dict[str, Any]:
    """A task that runs, with its arguments as Flower shows them, and for how many seconds."""
    started = task.get("time_start")
    return {
        "id": str(task.get("id")),
        "name": str(task.get("name")),
        "arguments": str(task.get("kwargs") if task.get("args") in (None, "()", [], ()) else task.get("args")),
        "running": None if started is None else max(0.0, time.time() - float(started)),
    }


def _show(found: list[dict[str, Any]], unserved: list[str], timeout: float) -> Iterator[RenderableType]:
    if not found:
        yield text(f"no worker answered within {duration(timeout)}; start one: celery -A tasks worker", "bold red")
        return
    rows = table("Worker", ">Slots", "Shards", "Other queues", ">Tasks", ">Up for")
    for worker in found:
        row = _row(worker)
        slots = NOTHING if row["slots"] is None else str(row["slots"])
        others = label(", ".join(_others(worker["queues"])) or NOTHING)
        up_for = duration(row["uptime_seconds"])
        rows.add_row(label(row["worker"]), slots, row["shards"] or NOTHING, others, number(row["tasks"]), up_for)
    yield rows
    busy = [(worker["name"], task) for worker in found for task in worker["active"]]
    if busy:
        rows = table("Runs now", "Task", "Arguments", ">For")
        for name, task in busy:
            rows.add_row(label(name), label(task["name"]), text(task["arguments"][:200]), duration(task["running"]))
        yield from ("", rows)
    if unserved:
        without = _shards(unserved)
        missing = [f"shards {ranges(without)}"] * bool(without) + _others(unserved)
        yield from ("", text(f"without a worker: {', '.join(missing)}", "bold red"))
