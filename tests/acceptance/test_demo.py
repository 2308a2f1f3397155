"""`make demo` as a user runs it: it ends well, and leaves nothing behind however it ends."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.servers import directory_for_servers
from tests.support import wait_until

_NAMES = [
    *("contiguous", "exactly once", "real-time order", "immutable"),
    *("never back", "replay-safe", "idempotent", "receipts agree"),
]
_MARKER = "TIDEMARK_DEMO_TEST"

# A second each on an idle machine for a dozen programs to load; minutes on a busy one.
pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A demo whose processes can be told from all others: by their environment, or by where they run."""

    directory: Path
    marker: str
    output: Path

    def start(self, *options: str) -> "subprocess.Popen[bytes]":
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TIDEMARK_", "PYTEST_"))
        }
        with self.output.open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "tests.demo", *options],
                env={**environment, "TMPDIR": str(self.directory), _MARKER: self.marker},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self.output.read_text("utf-8")

    def processes(self) -> list[psutil.Process]:
        """All that belong to it. The embedded servers get no environment of ours, but run in its directory."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                here = Path(process.cwd()).is_relative_to(self.directory)
                if here or process.environ().get(_MARKER) == self.marker:
                    found.append(process)
        return found

    def leftovers(self) -> list[str]:
        """What is not gone that should be."""
        return [*map(str, self.processes()), *map(str, self.directory.iterdir())]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    with directory_for_servers() as directory:
        demo = Demo(directory=directory, marker=uuid4().hex, output=tmp_path / "output")
        yield demo
        for process in demo.processes():
            with suppress(psutil.Error):
                process.kill()


def test_ends_well(demo: Demo) -> None:
    """The checks; who leases which shards, one clock that only goes on, how long the login lives; in 80 columns."""
    assert demo.start("--seconds", "3", "--producers", "2", "--workers", "2").wait(150) == 0, demo.text()
    found = re.findall(r"^(\d) (.{16}) (.{50}) (ok|VIOLATED)$", demo.text(), re.MULTILINE)
    assert [(number, name.strip(), verdict) for number, name, _, verdict in found] == [
        (str(number), name, "ok") for number, name in enumerate(_NAMES, start=1)
    ]
    # Of 60 commits some are rolled back; each kind of trouble was met.
    counts = [int(re.findall(r"[\d,]+", counted)[0].replace(",", "")) for _, _, counted, _ in found]
    assert counts[0] == counts[1] > 500
    assert all(count > 0 for count in counts)
    assert demo.leftovers() == []
    leased = re.findall(r"^.{7}  worker\d@\S+ leases shards (.+)$", demo.text(), re.MULTILINE)
    assert len(leased) == 2
    parts = [part.partition("-") for part in ", ".join(leased).split(", ")]
    shards = [shard for first, _, last in parts for shard in range(int(first), int(last or first) + 1)]
    assert sorted(shards) == list(range(8))
    clock = [float(seconds) for seconds in re.findall(r"^ *([\d.]+) s  ", demo.text(), re.MULTILINE)]
    assert clock == sorted(clock)
    assert len(clock) > 5
    assert "with --keep until Ctrl-C" in demo.text()
    assert max(map(len, demo.text().splitlines())) <= 80


def test_ctrl_c_while_producing(demo: Demo) -> None:
    """Everything runs by then: servers, workers, beat, Flower and producers."""
    process = demo.start("--seconds", "60", "--producers", "1", "--workers", "1")
    wait_until(lambda: "producing" in demo.text() or process.poll() is not None, timeout=120)
    assert process.poll() is None, demo.text()
    assert len(demo.processes()) > 10
    process.send_signal(signal.SIGINT)
    # A second one, of an impatient user, must not break off the first one's cleaning up.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 128 + signal.SIGINT, demo.text()
    assert "Traceback" not in demo.text()
    assert demo.leftovers() == []


@pytest.mark.parametrize("seconds", [0.0, 2.0])
def test_sigterm_while_starting(demo: Demo, seconds: float) -> None:
    """As soon as there is anything to clean up, and while the programs load."""
    process = demo.start("--producers", "1", "--workers", "1")
    wait_until(lambda: any(demo.directory.iterdir()), timeout=60)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM, demo.text()
    assert "Traceback" not in demo.text()
    assert demo.leftovers() == []


def test_program_that_dies(demo: Demo) -> None:
    """The demo says which, ends with exit code 1, and finds also what the dead one left behind."""
    process = demo.start("--seconds", "60", "--producers", "1", "--workers", "1")
    wait_until(lambda: "producing" in demo.text() or process.poll() is not None, timeout=120)
    (worker,) = [p for p in demo.processes() if p.ppid() == process.pid and "worker" in p.cmdline()]
    assert len(worker.children()) == 1
    worker.kill()
    assert process.wait(60) == 1, demo.text()
    message = r"^Error: worker1 was ended by SIGKILL; the end of its log:"
    assert re.search(message, demo.text(), re.MULTILINE), demo.text()
    assert demo.leftovers() == []
