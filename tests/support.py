"""What several tests need and no fixture is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import psutil
from psycopg import Connection
from psycopg.rows import TupleRow

from config.settings import Settings, Strategy
from tasks.compare import bucket_of
from tasks.hints import Background

T = TypeVar("T")

_DATABASE_PASSWORD = "kN4wTz8QxV2mRb6Lh0sJ"


def numbers_in(ranges: str) -> list[int]:
    """`0-2,5` as 0, 1, 2, 5."""
    spans = [span.split("-") for span in ranges.split(",") if span]
    return [number for span in spans for number in range(int(span[0]), int(span[-1]) + 1)]


def finish(background: Background) -> None:
    """Wait until all that was submitted is done."""
    background._thread.submit(int).result()


def strategy_of(partition_id: int, settings: Settings) -> Strategy:
    """The candidate for its share of the partitions, the strategy for the others."""
    share = round((settings.candidate_percent or 0) * 100)
    return settings.candidate if settings.candidate and bucket_of(partition_id) < share else settings.strategy


@contextmanager
def frozen(*pids: int) -> Iterator[None]:
    """Servers that hang, as in a virtual machine that is paused: their sockets stay, and nobody answers."""
    processes = [psutil.Process(pid) for pid in pids]
    for process in processes:
        process.suspend()
    # Those of a server that stands still get no more; one may be ending.
    processes += [child for process in processes for child in process.children(recursive=True)]
    try:
        for process in processes[len(pids) :]:
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()


class Connect(Protocol):
    """Opens one more connection to the test's database; the fixture closes it."""

    def __call__(self, *, autocommit: bool = True) -> Connection[TupleRow]: ...


def wait_until(condition: Callable[[], T], *, timeout: float = 30.0, interval: float = 0.02) -> T:
    """Return the first true value of `condition`; fail when there is none in time.

    The message is what `condition` is called, so give it a name that says what was waited for.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout:g} s still not: {getattr(condition, '__name__', condition)}")
        time.sleep(interval)
    return value


def with_password(url: str) -> str:
    """The URL of a database with a password, where it has none: an embedded server does not ask for it."""
    parts = urlsplit(url)
    user, _, host = parts.netloc.rpartition("@")
    return url if ":" in user else parts._replace(netloc=f"{user}:{_DATABASE_PASSWORD}@{host}").geturl()
