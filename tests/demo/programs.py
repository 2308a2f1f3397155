"""The process harness of demo, acceptance tests and benchmarks: starts, watches and stops Tidemark's programs.

Each program has a session of its own: a Ctrl-C in our terminal reaches us alone, and we stop the programs in order. The
session's process group also names what a program leaves behind. What a program writes goes into a log file.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import psutil

from config.embedded.host import tail
from config.errors import TidemarkError

ROOT = Path(__file__).parents[2]
HOST = "127.0.0.1"
_END_SECONDS = 20.0
# What a production default makes slow: tests wait for sweeps, restores and retries to happen.
FAST = {
    "TIDEMARK_SHARDS": "4",
    "TIDEMARK_FAN_OUT_INTERVAL": "0.2",
    "TIDEMARK_SWEEP_INTERVAL": "1",
    "TIDEMARK_QUEUED_SECONDS": "3",
    "TIDEMARK_TASK_SECONDS": "2",
    "TIDEMARK_MAINTENANCE_SECONDS": "1",
    "TIDEMARK_LOCK_TIMEOUT": "12",
    "TIDEMARK_STATEMENT_TIMEOUT": "12",
    "TIDEMARK_TRANSACTION_TIMEOUT": "20",
    "TIDEMARK_VISIBILITY_TIMEOUT": "92",
}
# By as many characters a secret is recognized.
_SIGNIFICANT = 10
# A program that is measured writes its coverage when it ends by itself.
_MEASURED_SECONDS = 10.0 if "COVERAGE_PROCESS_CONFIG" in os.environ else 0.0


class DemoError(TidemarkError):
    """A program, a server or an observer is gone, or did not get ready in time."""


class Process:
    """A program. Only one that `may_end` does so by itself, with exit code 0."""

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        log: Path,
        *,
        name: str = "",
        may_end: bool = False,
        directory: Path = ROOT,
    ) -> None:
        # What would configure Celery or Flower behind our back stays out.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("CELERY_", "FLOWER_"))}
        self.argv = list(argv)
        self.env = {**kept, **env}
        self.log = log
        self.name = name or log.stem
        self._may_end = may_end
        # Where its code lies.
        self.directory = directory
        self._process = self._spawn()

    def _spawn(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as output:
            return subprocess.Popen(
                self.argv,
                cwd=self.directory,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.poll()

    @property
    def running(self) -> bool:
        return self.returncode is None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def require_well(self) -> None:
        """Raise DemoError, with the end of its log, if the program is gone and should not be."""
        code = self.returncode
        if code is not None and not (code == 0 and self._may_end):
            cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise DemoError(f"{self.name} {cause}; the end of its log:\n{tail(self.log)}")

    def tell(self, line: str) -> None:
        """Write a line to its standard input, which stays open. A program that is gone is found by who watches it."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, timeout: float = _END_SECONDS) -> int:
        return self._process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL to the program and all it started, as `docker kill` does."""
        # A leader there that is not ours any more is a stranger's.
        if self.running or not psutil.pid_exists(self.pid):
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self.wait()

    def end(self, timeout: float = _END_SECONDS) -> None:
        """Stop in order, then by force; whatever was left of the session goes too."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.wait(timeout)
        self.kill()

    def restart(self) -> None:
        self.end()
        self.close()
        self._process = self._spawn()

    def close(self) -> None:
        """Kill what still runs."""
        self.kill()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def children(self) -> list[int]:
        """Pids of the processes it forked."""
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]


class Programs:
    """All programs of a run, in the order of their start. `env` leads them to the run's servers."""

    def __init__(
        self,
        logs: Path,
        env: Mapping[str, str],
        held: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.logs = logs
        self.env = env
        # Around each start: a signal that came between would leave a program that nobody knows.
        self._held = held
        self._programs: list[Process] = []
        self._outputs: list[tuple[str, str]] = []

    def process(
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, *, may_end: bool = False
    ) -> Process:
        with self._held():
            log = self.logs / f"{name.replace(' ', '-')}.log"
            process = Process(argv, {**self.env, **(env or {})}, log, name=name, may_end=may_end)
            self._programs.append(process)
        return process

    def celery(self, name: str, *arguments: str, env: Mapping[str, str] | None = None) -> Process:
        """`celery -A tasks …`, in the background."""
        return self.process(name, celery_argv(*arguments), env)

    def run(
        self, *arguments: str, env: Mapping[str, str] | None = None, timeout: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        """`celery -A tasks …` until it ends."""
        done = subprocess.run(
            celery_argv(*arguments),
            check=False,
            cwd=ROOT,
            env={**os.environ, **self.env, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        self._outputs.append((f"celery -A tasks {' '.join(arguments)}", done.stdout + done.stderr))
        return done

    def require_well(self) -> None:
        """Raise DemoError if one of them died."""
        for program in self._programs:
            program.require_well()

    def outputs(self) -> list[tuple[str, str]]:
        """Name and output of everything that was started."""
        return [*self._outputs, *((program.name, program.output()) for program in self._programs)]

    def stop(self, grace: float = _MEASURED_SECONDS) -> None:
        """SIGTERM to them all, the last one first, and after `grace` seconds SIGKILL to what is left."""
        if grace:
            for program in reversed(self._programs):
                if program.running:
                    program.signal(signal.SIGTERM)
            deadline = time.monotonic() + grace
            while any(program.running for program in self._programs) and time.monotonic() < deadline:
                time.sleep(0.05)
        for program in self._programs:
            program.close()


def celery_argv(*arguments: str, app: str = "tasks") -> list[str]:
    """The command line of Celery's program in this environment."""
    return [sys.executable, "-m", "celery", "-A", app, *arguments]


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def leaks(outputs: Sequence[tuple[str, str]], secrets: Collection[str]) -> list[str]:
    """What stands before each secret in the outputs, once; the secret itself is left out."""
    found = []
    for name, output in outputs:
        # A table or a frame around a traceback breaks lines where it likes, and cuts off what is long.
        words = re.sub(r"[\s│]+", "", output)
        for secret in secrets:
            begin = secret[:_SIGNIFICANT]
            found += [
                f"{name}: {words[max(0, at.start() - 60) : at.start()]}…" for at in re.finditer(re.escape(begin), words)
            ]
    return list(dict.fromkeys(found))
