"""Repeating a transaction: what is repeated, how often, and what is said in the end."""

from collections.abc import Callable

import psycopg
import pytest
from psycopg import errors
from psycopg_pool import PoolTimeout

from config.errors import TransientDatabaseError, UnknownTopicError
from config.settings import Settings
from tasks.retries import with_retries

SETTINGS = Settings(retries=3, retry_seconds=0.001)


def failing(times: int, error: Exception) -> tuple[Callable[[], str], list[int]]:
    calls: list[int] = []

    def work() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "done"

    return work, calls


@pytest.mark.parametrize(
    "error",
    [
        errors.DeadlockDetected("deadlock detected"),
        errors.SerializationFailure("could not serialize"),
        errors.LockNotAvailable("lock timeout"),
        errors.QueryCanceled("statement timeout"),
        errors.AdminShutdown("terminating connection"),
        psycopg.OperationalError("connection refused"),
        PoolTimeout("no connection"),
    ],
)
def test_a_transient_error_is_repeated_until_it_works(error: Exception) -> None:
    work, calls = failing(3, error)
    seen: list[BaseException] = []

    assert with_retries(SETTINGS, work, on_error=seen.append) == "done"
    assert len(calls) == 4
    assert seen == [error] * 3


def test_a_transient_error_that_stays_becomes_one_error_that_says_so() -> None:
    work, calls = failing(99, errors.DeadlockDetected("deadlock detected"))

    with pytest.raises(TransientDatabaseError, match=r"4 times in a row.*DeadlockDetected: deadlock detected"):
        with_retries(SETTINGS, work)
    assert len(calls) == 4


@pytest.mark.parametrize(
    "error", [UnknownTopicError("no such topic"), errors.UniqueViolation("duplicate"), ValueError("wrong")]
)
def test_what_would_fail_again_is_not_repeated(error: Exception) -> None:
    work, calls = failing(99, error)

    with pytest.raises(type(error)):
        with_retries(SETTINGS, work)
    assert len(calls) == 1
