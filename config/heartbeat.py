"""Reads the sign of life that a program leaves in a file (`tasks.health` writes it).

Imports only the standard library, so a probe costs 30 ms: `python -m config.heartbeat FILE [--ready]` ends with 0
when the program lives (and is ready), else with 1. `celery -A tasks health` says the same, and knows where the file is.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path


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
