"""What both servers have in common: a directory, the right to run there, and one process.

- `owner.lock` is held by the process that owns the server. Whoever gets it knows that the last owner is gone, and
  that any server still running in the directory is a leftover of an owner that was killed.
- Leftovers are found by program name and working directory, not by a pid file: a pid outlives its process, and a
  killed postmaster's children have lost theirs. They are ended by SIGKILL: what they acknowledged is in their log
  files, and the next start recovers it.
"""

import signal
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import psutil

from config.embedded.host import Account, FileLock, claim, open_log, runnable, tail
from config.errors import EmbeddedServerError

OWNER_LOCK = "owner.lock"

_POLL = 0.02
_KILL_SECONDS = 10.0
# Who looks whether somebody has the lock takes it for an instant.
_LOCK_SECONDS = 1.0


class EmbeddedServer(ABC):
    """Subclasses say what to run and when it is ready."""

    program: ClassVar[str]
    stop_signal: ClassVar[signal.Signals]
    start_seconds: ClassVar[float]
    stop_seconds: ClassVar[float]

    def __init__(self, directory: Path, binary: Path) -> None:
        self._account = Account.for_servers()
        self._directory = claim(directory, self._account)
        self._data = self._directory / "data"
        self._log = self._directory / "server.log"
        self._owner = FileLock(self._directory / OWNER_LOCK)
        self._binary = binary
        self._process: subprocess.Popen[bytes] | None = None

    @abstractmethod
    def _prepare(self) -> list[str | Path]:
        """Make the data directory ready for a start, whatever the last run left; return the command."""

    @abstractmethod
    def _is_ready(self, pid: int) -> bool: ...

    @property
    def pid(self) -> int:
        if self._process is None:
            raise EmbeddedServerError(f"{self.program} in {self._directory} was never started")
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def own(self) -> None:
        """Become the one process that may run a server here."""
        if not self._owner.acquire(time.monotonic() + _LOCK_SECONDS):
            raise EmbeddedServerError(f"Another process runs {self.program} in {self._directory}")

    def stop(self) -> None:
        """Stop in order. Does nothing when it is stopped, or when another process owns the directory by now."""
        if not self._owner.try_acquire():
            return
        try:
            self._end()
        finally:
            self._clean_up()
            self._owner.release()

    def restart(self) -> None:
        """Stop what still runs and start again, at the same URL (a Postgres after `stop`: at a new one)."""
        self.own()
        self._end()
        self.launch()

    def _clean_up(self) -> None:  # noqa: B027 - Redis has nothing there
        """Remove what lies outside the directory."""

    def launch(self) -> None:
        """Start it; on return it answers."""
        self._kill_all()
        self._binary = runnable(self._binary, self._account, self._directory)
        command = self._prepare()
        with open_log(self._log) as log:
            self._process = subprocess.Popen(
                command, cwd=self._data, stdin=subprocess.DEVNULL, stdout=log, **self._account.how()
            )
        try:
            self._await_ready(self._process)
        except BaseException:  # Ctrl-C as well: nobody else knows of the process yet
            self._end()
            raise

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self.start_seconds
        while not self._is_ready(process.pid):
            if (code := process.poll()) is not None or time.monotonic() > deadline:
                what = "is not ready in time" if code is None else f"did not start (exit code {code})"
                raise EmbeddedServerError(f"{self.program} in {self._directory} {what}:\n{tail(self._log)}")
            time.sleep(_POLL)

    def _end(self) -> None:
        if self._process is not None:
            self._process.send_signal(self.stop_signal)  # does nothing to one that has ended
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(self.stop_seconds)
            self._kill_all()

    def _kill_all(self) -> None:
        """End every process of this server, and those it forks meanwhile; zombies have no working directory."""
        deadline = time.monotonic() + _KILL_SECONDS
        ours = {"name": self.program, "cwd": str(self._data.resolve())}
        while left := [process for process in psutil.process_iter([*ours]) if process.info == ours]:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            if time.monotonic() > deadline:
                raise EmbeddedServerError(f"Processes of {self._data} do not die: {[p.pid for p in left]}")
            time.sleep(_POLL)
        if self._process is not None:
            self._process.kill()  # for a system that does not tell us its working directory; else a no-op
            self._process.wait(_KILL_SECONDS)
