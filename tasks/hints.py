"""Redis, for what may as well be missing: tokens, metrics, leases, traces (invariant 8: truth lives in Postgres alone).

Whoever asks goes on without an answer. A Redis that hangs is the worst case: each question would wait for its
time-out. So time-outs are short, and after a failure nothing is asked for some seconds: while Redis is away a task
loses half a second now and then, and no more.
"""

import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from redis import RedisError

from tasks.app import TidemarkApp

if TYPE_CHECKING:
    from redis import Redis

log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_PAUSE_SECONDS = 5.0


class Hints:
    """Asks the app's Redis. Usable by several threads; a question that is under way is nobody else's affair."""

    def __init__(self, app: TidemarkApp) -> None:
        self._redis = app.redis
        self._silent_until = 0.0
        self._away = False

    @property
    def available(self) -> bool:
        """False without a Redis, and for some seconds after one did not answer."""
        return self._redis is not None and monotonic() >= self._silent_until

    def ask(self, question: "Callable[[Redis], _Answer]", otherwise: _Answer) -> _Answer:
        """What `question` returns; `otherwise` where there is no Redis, or it does not answer."""
        if self._redis is None or not self.available:
            return otherwise
        try:
            answer = question(self._redis)
        except RedisError as error:
            self._note(error)
            return otherwise
        self._note(None)
        return answer

    def _note(self, error: RedisError | None) -> None:
        # Without a lock, which a fork could leave held for ever. Two threads at once may log twice.
        was_away, self._away = self._away, error is not None
        if error is not None:
            self._silent_until = monotonic() + _PAUSE_SECONDS
            if not was_away:
                log.warning(
                    "Redis does not answer: going on without its hints",
                    extra={"error": f"{type(error).__name__}: {error}", "next_question_seconds": _PAUSE_SECONDS},
                )
        elif was_away:
            log.warning("Redis answers again")
