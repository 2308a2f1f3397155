"""Tidemark's app in a process that dies where it is told to, for `celery -A tests.faults.mortal worker`.

A file `TIDEMARK_TEST_DEATHS/armed` holds a number: the task that takes the file first ends its process with SIGKILL at
so many boundaries of its statements: before what it sends to Postgres, and behind the answer. `acknowledge` in place of
a number lets it end all its work, and ends the worker before the message is acknowledged. `clock` holds by how many
seconds this process' clock is wrong.
"""

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import signals

_DEATHS = Path(os.environ["TIDEMARK_TEST_DEATHS"])
_ACKNOWLEDGE = "acknowledge"
_right_time = time.time


def _time() -> float:
    """Wrong by what the file says, from one moment to the next."""
    try:
        return _right_time() + float((_DEATHS / "clock").read_text())
    except (OSError, ValueError):
        return _right_time()


time.time = _time

from tasks import app  # noqa: E402 - it must get the wrong clock
from tests.faults.boundaries import Boundaries  # noqa: E402

boundaries = Boundaries()


@signals.task_prerun.connect(weak=False)
def _take_the_order(task: Any, **_: object) -> None:
    mine = _DEATHS / f"taken-{os.getpid()}"
    try:
        (_DEATHS / "armed").rename(mine)
    except FileNotFoundError:
        return
    order = mine.read_text()
    boundaries.left = None if order == _ACKNOWLEDGE else int(order)


@signals.task_postrun.connect(weak=False)
def _survive(**_: object) -> None:
    """The task had no such boundary; or it is to die with its message."""
    boundaries.left = None
    mine = _DEATHS / f"taken-{os.getpid()}"
    if not mine.exists():
        return
    order = mine.read_text()
    mine.rename(mine.with_name(f"survived-{os.getpid()}-{time.monotonic_ns()}"))
    if order == _ACKNOWLEDGE:
        # The pool's child acknowledges nothing: that is its parent's.
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


__all__ = ["app"]
