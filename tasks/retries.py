"""Repeats a transaction after a transient database error: exponential backoff with jitter, a fresh connection each
time.

First of three lines: then Celery retries the task, and at last the next tick or sweep finds the work again.
"""

import logging
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from tenacity.stop import stop_after_attempt, stop_before_delay

from config.errors import TransientDatabaseError
from config.settings import Settings
from db.translate import is_transient

log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_LONGEST_PAUSE = 5.0


def with_retries(
    settings: Settings,
    work: Callable[[], _Result],
    *,
    until: float = inf,
    on_error: Callable[[BaseException], None] | None = None,
    retry: Callable[[BaseException], bool] = is_transient,
) -> _Result:
    """Return `work()`, repeated as the settings allow; TransientDatabaseError when that was not enough.

    No attempt begins after `until` (of `time.monotonic`), the end of the task's time: an attempt may take as long as
    a statement may, and a task that outlasts its hard time limit is killed. `on_error` hears of each failed attempt. An
    error that `retry` does not admit ends it at once, and stays what it is.
    """

    def note(state: RetryCallState) -> None:
        if state.outcome and (error := state.outcome.exception()):
            said = f"{type(error).__name__}: {str(error).strip()}"
            log.warning("attempt failed", extra={"attempt": state.attempt_number, "error": said})
            if on_error is not None:
                on_error(error)

    attempts = Retrying(
        retry=retry_if_exception(retry),
        stop=stop_after_attempt(settings.retries + 1) | stop_before_delay(until - monotonic()),
        wait=wait_random_exponential(multiplier=settings.retry_seconds, max=_LONGEST_PAUSE),
        after=note,
        reraise=True,
    )
    try:
        return attempts(work)
    except Exception as error:
        if not (retry(error) and is_transient(error)):
            raise
        tries = attempts.statistics.get("attempt_number", 1)
        raise TransientDatabaseError(
            f"Postgres failed {tries} times in a row, at last with {type(error).__name__}: "
            f"{str(error).strip()}. The task is tried again later; see whether the server is up and what it logs."
        ) from error
