"""What several tests need and no fixture is."""

import time
from collections.abc import Callable
from typing import Protocol, TypeVar

from psycopg import Connection
from psycopg.rows import TupleRow

T = TypeVar("T")


class Connect(Protocol):
    """Opens one more connection to the test's database; the fixture closes it."""

    def __call__(self, *, autocommit: bool = True) -> Connection[TupleRow]: ...


def wait_until(condition: Callable[[], T], *, timeout: float = 15.0, interval: float = 0.02) -> T:
    """Return the first true value of `condition`; fail when there is none in time.

    The message is what `condition` is called, so give it a name that says what was waited for.
    """
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"after {timeout:g} s still not: {getattr(condition, '__name__', condition)}")
        time.sleep(interval)
    return value
