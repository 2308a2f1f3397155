"""Signs of life: a file that a program touches while its main loop runs, for `celery -A tasks health`.

The file's time is the last beat; it holds whether the program is ready, and after how many seconds without a beat it
counts as dead. That is the program's to know:

- A worker beats every 2 s from a timer of its event loop, so a hung loop stops it. With a solo pool tasks run in that
  loop, and it may be silent as long as one may take: `solo_silence`. Celery's time limits do not bound those, so this
  lies above a task's hard time limit. Other pools leave the loop free but for calls of the broker, which end in 30 s.
- Beat beats with each of its ticks (every few seconds) and each task it publishes.
- The exporter beats while its port answers.

A worker that has lost the broker is in a loop that tries to connect, and beat may wait for the broker or for its turn
(RedBeat) before its first tick. A restart would help in neither case, so a thread beats meanwhile. The same holds
while a worker waits for its last tasks when it stops.

Imports only the standard library, so a probe costs 40 ms: `python -m config.heartbeat FILE [--ready]` ends with 0
when the program lives (and is ready), else with 1. `celery -A tasks health` says the same, and knows where the file is.
"""

import atexit
import json
import logging
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from config.settings import Settings

log = logging.getLogger(__name__)

Program = Literal["worker", "beat", "exporter"]
PROGRAMS: tuple[Program, ...] = get_args(Program)

INTERVAL = 2.0
WORKER_SILENCE = 60.0
# One publication: four tries of at most 30 s.
BEAT_SILENCE = 150.0
EXPORTER_SILENCE = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class SignOfLife:
    """What the file holds; its time is the last beat. Without one for `stale_after` seconds the program is dead."""

    pid: int
    program: str
    ready: bool
    stale_after: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What a sign of life says at the moment; `age` in seconds is None where there is no sign."""

    alive: bool = False
    ready: bool = False
    age: float | None = None
    reason: str


def heartbeat_file(settings: "Settings", program: Program) -> Path:
    return settings.heartbeat_file or settings.data_dir / f"{program}.heartbeat"


def solo_silence(settings: "Settings") -> float:
    """The longest a task may keep a solo worker's loop: its budget, and every attempt of one last transaction."""
    attempt = max(settings.statement_timeout, settings.pool_wait) + settings.lock_timeout
    return max(settings.task_seconds, settings.maintenance_seconds) + (settings.retries + 1) * attempt + 30


class Heartbeat:
    def __init__(self, file: Path, program: Program, *, stale_after: float) -> None:
        self._file = file
        self._sign = SignOfLife(pid=os.getpid(), program=program, ready=False, stale_after=stale_after)
        self._failed = False
        self._occupied = False
        self._ended = Event()
        self._write()
        atexit.register(self.end)
        Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def tick(self) -> None:
        """The main loop runs."""
        try:
            os.utime(self._file)
        except FileNotFoundError:
            # Another program that shares the file has ended.
            self._write()
        except OSError as error:
            self._complain(error)

    def set_ready(self, *, ready: bool) -> None:
        """Whether the program does its work by now."""
        self._sign = replace(self._sign, ready=ready)
        self._write()

    def wait(self) -> None:
        """From now on the main thread is occupied with good reason: beat in its place, until `resume`."""
        self._occupied = True

    def resume(self) -> None:
        """The main loop beats by itself again."""
        self._occupied = False
        self.tick()

    def end(self) -> None:
        self._ended.set()
        # A forked child's end is not ours.
        if os.getpid() == self._sign.pid:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(INTERVAL):
            if self._occupied:
                self.tick()

    def _write(self) -> None:
        from config.embedded.host import write_private  # noqa: PLC0415 - a probe does without

        try:
            self._file.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
            write_private(self._file, json.dumps(asdict(self._sign)))
            self._failed = False
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        # Who cannot write a file still does its work. Said once.
        if not self._failed:
            self._failed = True
            log.warning("cannot write the heartbeat file", extra={"error": str(error)})


# --- The probe


def examine(file: Path) -> Health:
    """Look at a sign of life: a file, whatever becomes of the servers."""
    try:
        age = max(0.0, time.time() - file.stat().st_mtime)
        sign = SignOfLife(**json.loads(file.read_text("utf-8")))
    except FileNotFoundError:
        return Health(reason=f"{file} is not there: it does not run")
    except (ValueError, TypeError, OSError) as error:
        return Health(reason=f"{file} cannot be read: {error}")
    if age > sign.stale_after:
        silence = f"no sign of life for {age:.0f} s, more than {sign.stale_after:.0f} s"
        return Health(age=age, reason=f"{silence}: process {sign.pid} hangs or is gone")
    return Health(alive=True, ready=sign.ready, age=age, reason="ready" if sign.ready else "alive, not ready")


def main(arguments: list[str]) -> int:
    """The probe; returns its exit code."""
    files = [argument for argument in arguments if argument != "--ready"]
    if len(files) != 1 or files[0].startswith("-"):
        sys.stderr.write("usage: python -m config.heartbeat FILE [--ready]\n")
        return 2
    found = examine(Path(files[0]))
    sys.stderr.write(f"{found.reason}\n")
    return 0 if (found.ready if "--ready" in arguments else found.alive) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
