"""Provokes deadlocks: a session that locks partitions against the order which everything of ours keeps.

It takes the last partition of somebody's transaction, waits until that one has run into it (and so holds the others),
and then asks for the first. Each waits for the other until Postgres ends the one that finds out first: the one with
the shorter deadlock_timeout. Materializers connect `as_victim`; the session here has a longer one.
"""

import random
from collections.abc import Callable, Sequence
from threading import Barrier, Event, Thread
from types import TracebackType
from typing import Any, Self

import psycopg
from psycopg import errors
from psycopg.conninfo import make_conninfo

from tests.benchmarks.cold import Share

# Postgres looks for a deadlock after waiting so long; its default of a second would be most of what is measured. Long
# enough for the session here to close the circle before.
_VICTIM = "20ms"
_SURVIVOR = "200ms"
# From the end of one disturbance to the next: what keeps their rate bounded.
_EVERY = 0.02
_SESSIONS = 4
# Nobody may come: the transaction's owner pauses, or has none of the connections.
_PATIENCE = 0.05
_CONNECT_SECONDS = 30.0

# In the server, for the circle has to be closed in time, and a client may wait long for its interpreter's lock.
_CROSS_LOCKS = """
create function pg_temp.cross_locks(first int, last int, patience float8) returns void language plpgsql as $$
declare
    until timestamptz;
begin
    perform from tidemark.topic_partitions where id = last for no key update;
    until := clock_timestamp() + make_interval(secs => patience);
    while clock_timestamp() < until loop
        if exists (
            select from pg_locks
            where locktype = 'transactionid' and transactionid = pg_current_xact_id()::xid and not granted
        ) then
            perform from tidemark.topic_partitions where id = first for no key update;
            return;
        end if;
        perform pg_sleep(0.001);
    end loop;
end $$
"""


def as_victim(url: str) -> str:
    """The address for those who are to lose."""
    return make_conninfo(url, options=f"-c deadlock_timeout={_VICTIM}")


class Disturbers:
    """Sessions that each disturb the owners of the shares, one after the other, at random."""

    def __init__(self, url: str, shares: Sequence[Share], is_finished: Callable[[Share], bool]) -> None:
        self._url = make_conninfo(url, options=f"-c deadlock_timeout={_SURVIVOR}")
        self._shares = shares
        self._is_finished = is_finished
        self._stop = Event()
        # All are connected before the clock of what they disturb starts.
        self._connected = Barrier(1 + _SESSIONS, timeout=_CONNECT_SECONDS)
        self._threads = [Thread(target=self._disturb, args=(number,)) for number in range(_SESSIONS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self._connected.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _disturb(self, number: int) -> None:
        choice = random.Random(number)
        with psycopg.connect(self._url, autocommit=True) as conn:
            conn.execute(_CROSS_LOCKS)
            self._connected.wait()
            while not self._stop.wait(_EVERY):
                share = choice.choice(self._shares)
                # Who has finished has its turn all the same: else whoever is late would be disturbed without a pause.
                if not self._is_finished(share):
                    self._cross(conn, share)

    def _cross(self, conn: psycopg.Connection[Any], share: Share) -> None:
        try:
            conn.execute("select pg_temp.cross_locks(%s, %s, %s)", (share.first, share.last, _PATIENCE))
        except errors.DeadlockDetected:
            # This time it was this session's turn. Nothing was changed.
            return
