"""Starts, watches and stops the programs of the demo.

Each gets a session of its own: a Ctrl-C in our terminal reaches us alone, and we stop them in order. The session also
names whatever a program leaves behind: processes stay in it when their parent is gone.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from config.embedded.host import tail
from tests.demo.interrupts import Interrupts
from tests.demo.plan import DemoError

_POLL = 0.05
_STOP_SECONDS = 10.0
_KILL_SECONDS = 5.0


class Program:
    """One program and its log. Only one that `may_end` does so by itself, with exit code 0."""

    def __init__(self, name: str, process: "subprocess.Popen[bytes]", log: Path, *, may_end: bool) -> None:
        self.name = name
        self.process = process
        self.log = log
        self._may_end = may_end

    @property
    def exit_code(self) -> int | None:
        return self.process.poll()

    def require_well(self) -> None:
        """Raise DemoError, with the end of its log, if the program is gone and should not be."""
        code = self.exit_code
        if code is not None and not (code == 0 and self._may_end):
            cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise DemoError(f"{self.name} {cause}; the end of its log:\n{tail(self.log)}")

    def tell(self, line: str) -> None:
        """Write a line to its standard input, which stays open. A program that is gone is found by who watches it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()


class Programs:
    """All programs that run, in the order of their start."""

    def __init__(self, logs: Path, interrupts: Interrupts) -> None:
        self._logs = logs
        self._interrupts = interrupts
        self._programs: list[Program] = []
        self._sessions: list[int] = []

    def start(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], *, may_end: bool = False
    ) -> Program:
        log = self._log_file(name)
        with log.open("xb") as file, self._interrupts.held():
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            program = Program(name, process, log, may_end=may_end)
            self._programs.append(program)
            self._sessions.append(process.pid)
        return program

    def require_well(self) -> None:
        """Raise DemoError if one of them died."""
        for program in self._programs:
            program.require_well()

    def log_of(self, name: str) -> str:
        """The end of a program's log."""
        return tail(self._log_file(name))

    def stop(self) -> None:
        """End them all: SIGTERM, SIGKILL after a grace, and SIGKILL for what they left behind."""
        for program in reversed(self._programs):
            if program.exit_code is None:
                program.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while any(program.exit_code is None for program in self._programs) and time.monotonic() < deadline:
            time.sleep(_POLL)
        for program in self._programs:
            if program.exit_code is None:
                program.process.kill()
            program.process.wait()
            if program.process.stdin is not None:
                with suppress(BrokenPipeError):
                    program.process.stdin.close()
        self._programs = []
        deadline = time.monotonic() + _KILL_SECONDS
        while (left := self._left_behind()) and time.monotonic() < deadline:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_POLL)

    def _log_file(self, name: str) -> Path:
        return self._logs / f"{name.replace(' ', '-')}.log"

    def _left_behind(self) -> list[psutil.Process]:
        """Members of our programs' sessions. Their leaders are reaped, so a leader there is a stranger's."""
        sessions = set(self._sessions)
        left = []
        for process in psutil.process_iter(["status"]):
            if process.info["status"] == psutil.STATUS_ZOMBIE:
                continue
            with suppress(ProcessLookupError, PermissionError):
                session = os.getsid(process.pid)
                if session in sessions and not psutil.pid_exists(session):
                    left.append(process)
        return left
