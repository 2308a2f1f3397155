"""Defaults for `celery -A tasks flower`: a page that is closed, local, remembers, and reads well.

Flower's own defaults listen on every address and ask nobody for a password. Every option of Flower's, given on the
command line or as `FLOWER_…`, goes before these.
"""

import ast
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from config.queues import MATERIALIZE
from config.settings import Settings

_USER = "tidemark"
_WIDTH = 100
# What is said of a materialize task where there is any.
_ALSO = {"errors": "failed attempts", "backlog_partitions": "partitions left", "stuck_partitions": "stuck"}


def apply(settings: Settings) -> str:
    """Set the defaults in this process's environment; returns how to log in, for people."""
    from flower.options import options  # noqa: PLC0415 - only where Flower is what starts

    # A file given by --conf goes before this, too: it is read later.
    options.format_task = summarize
    directory = settings.data_dir
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    defaults = {
        "FLOWER_ADDRESS": "127.0.0.1",
        "FLOWER_BASIC_AUTH": settings.flower_auth or f"{_USER}:{_secret(directory / 'flower-password')}",
        # Or every restart ends all sessions.
        "FLOWER_COOKIE_SECRET": _secret(directory / "flower-cookie"),
        "FLOWER_PERSISTENT": "true",
        "FLOWER_DB": str(directory / "flower.db"),
        # Milliseconds; Flower's default never saves.
        "FLOWER_STATE_SAVE_INTERVAL": "30000",
        # Seconds; or the list shows every worker there ever was.
        "FLOWER_PURGE_OFFLINE_WORKERS": "300",
        "FLOWER_MAX_TASKS": "10000",
        # The id is the link to a task's page; what it was comes with its arguments. What may be long stands last: so
        # nothing else falls off at 1280 pixels.
        "FLOWER_TASKS_COLUMNS": "uuid,args,state,received,runtime,result",
        # "a minute ago": a date with milliseconds is twice as wide.
        "FLOWER_NATURAL_TIME": "true",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if settings.flower_auth is None and os.environ["FLOWER_BASIC_AUTH"].startswith(f"{_USER}:"):
        file = directory / "flower-password"
        return f"Flower: user {_USER}, password in {file} (or set TIDEMARK_FLOWER_AUTH)"
    return "Flower: log in as FLOWER_BASIC_AUTH or TIDEMARK_FLOWER_AUTH says"


def summarize(task: Any) -> Any:
    """What a task was asked, and what it did or why it failed, in the words that fit a column of the list."""
    task.args = f"{(task.name or '').removeprefix('tasks.')} {task.args or ''}".rstrip()
    if task.exception and not task.result:
        line = " ".join(str(task.exception).split())
        task.result = line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…"
    elif task.name == MATERIALIZE and task.result:
        try:
            done = ast.literal_eval(task.result)
            words = [
                f"{done['events_processed']} events, {done['records']} records, {done['processing_time_ms']:.0f} ms",
                f"lock wait {done['lock_wait_time_ms']:.0f} ms",
                *(f"{done[name]} {what}" for name, what in _ALSO.items() if done[name]),
                str(done["strategy"]),
            ]
        except (ValueError, SyntaxError, TypeError, KeyError):
            # Celery has cut it off.
            return task
        task.result = ", ".join(words)
    return task


def _secret(file: Path) -> str:
    """The secret in the file, made at first use; nobody else may read it."""
    with suppress(FileExistsError):
        file.touch(mode=0o600, exist_ok=False)
        file.write_text(f"{secrets.token_urlsafe(18)}\n", "ascii")
    return file.read_text("ascii").strip()
