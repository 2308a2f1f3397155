"""Ctrl-C, SIGTERM and SIGHUP: the first one ends the demo, wherever it is, and none breaks off its cleaning up."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by the first signal."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for a program that a signal ended."""
        return 128 + self.number


class Interrupts:
    """Turns the first signal into `Interrupted`; while held it waits, so that nothing started gets lost unrecorded."""

    def __init__(self) -> None:
        self._received: int | None = None
        self._raised = False
        self._holds = 0
        self._before: dict[signal.Signals, Any] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let a signal wait until the end of the block."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._deliver()

    def hold(self) -> None:
        """Let all signals wait from now on: what follows is cleaning up."""
        self._holds += 1

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self._received is None:
            self._received = number
        self._deliver()

    def _deliver(self) -> None:
        if self._received is not None and not self._raised and not self._holds:
            self._raised = True
            raise Interrupted(self._received)
