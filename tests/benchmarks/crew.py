"""Several clients at once: processes, each with a connection of its own, that start together.

Threads would share one interpreter, and the client's work would count as the server's time.
"""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import psycopg

from tests.benchmarks.measure import Sample

Job = Callable[[psycopg.Connection[Any], Any], int]


class _Turn(NamedTuple):
    """`perf_counter` is the machine's, so times of different processes compare."""

    begin: float
    end: float
    cpu_seconds: float
    units: int


class Crew:
    """`size` processes connected to `url`, for any number of runs."""

    def __init__(self, url: str, size: int) -> None:
        self.size = size
        # Not forked: a connection that two processes share is corrupted for both.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(
            size, mp_context=context, initializer=_Member.join, initargs=(url, context.Barrier(size))
        )

    def run(self, job: Job, arguments: Sequence[Any]) -> Sample:
        """One argument for each process; `job` returns how many units of work it did."""
        if len(arguments) != self.size:
            raise ValueError(f"{len(arguments)} arguments for {self.size} processes")
        turns = list(self._pool.map(_Member.work, [job] * self.size, arguments))
        return Sample(
            seconds=max(t.end for t in turns) - min(t.begin for t in turns),
            cpu_seconds=sum(t.cpu_seconds for t in turns),
            units=sum(t.units for t in turns),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Member:
    """What lives in a process of the crew."""

    conn: ClassVar[psycopg.Connection[Any]]
    barrier: ClassVar[Barrier]

    @classmethod
    def join(cls, url: str, barrier: Barrier) -> None:
        cls.conn = psycopg.connect(url, autocommit=True)
        cls.barrier = barrier

    @classmethod
    def work(cls, job: Job, argument: Any) -> _Turn:
        # Nobody takes a second argument: the first one waits here until all processes have theirs.
        cls.barrier.wait(timeout=60)
        cpu = cpu_seconds(cls.conn)
        begin = perf_counter()
        units = job(cls.conn, argument)
        end = perf_counter()
        return _Turn(begin=begin, end=end, cpu_seconds=cpu_seconds(cls.conn) - cpu, units=units)


def cpu_seconds(conn: psycopg.Connection[Any]) -> float:
    """CPU time of the connection's server process, which runs on this machine."""
    path = Path("/proc", str(conn.info.backend_pid))
    if (path / "schedstat").exists():
        return int((path / "schedstat").read_text().split()[0]) / 1e9
    fields = (path / "stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
