"""One thread for what a committing thread must not wait for: wake-ups, and traces in Redis.

All of it is hints: what cannot be done is dropped, and fan-out finds the commits. A broker that hangs costs this thread
seconds; meanwhile commits go on, and beyond a limit their wake-ups are dropped. When the process ends, what waits is
done first.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import BoundedSemaphore
from time import monotonic
from typing import Any

log = logging.getLogger(__name__)

_WAITING = 1_000
_PAUSE_SECONDS = 5.0


class Background:
    """The thread of one process; a forked child gets its own."""

    def __init__(self, _app: object = None) -> None:
        self._start_over()

    def _start_over(self) -> None:
        self._pid = os.getpid()
        self._room = BoundedSemaphore(_WAITING)
        self._silent_until = 0.0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tidemark-background")

    def submit(self, work: Callable[..., Any], *arguments: Any) -> None:
        """Do it soon, or drop it. Never waits, never raises."""
        if self._pid != os.getpid():
            self._start_over()
        if monotonic() >= self._silent_until and self._room.acquire(blocking=False):
            with suppress(RuntimeError):  # the interpreter is ending
                self._thread.submit(self._do, work, arguments)

    def _do(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        try:
            if monotonic() >= self._silent_until:
                work(*arguments)
        except Exception as error:  # noqa: BLE001 - the commit stands; nothing that happens here may harm anybody
            self._silent_until = monotonic() + _PAUSE_SECONDS
            log.warning(
                "waking failed: for some seconds fan-out alone finds commits",
                extra={"error": f"{type(error).__name__}: {error}", "seconds": _PAUSE_SECONDS},
            )
        finally:
            self._room.release()
