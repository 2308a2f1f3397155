"""The process that owns the embedded servers: `python -m config.embedded.keeper DIRECTORY [LINGER_SECONDS]`.

Started by `config.embedded.attach`, whose module explains the locks. It leaves by itself when the last user has
left; SIGTERM and SIGINT end it, and the servers, at once.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from config.embedded.lease import LINGER_SECONDS, Endpoints, Places
from config.embedded.locks import FileLock
from config.embedded.postgres import PostgresServer
from config.embedded.redis import RedisServer
from config.errors import EmbeddedServerError

_TICK = 0.2
_LONGEST_PAUSE = 30.0
# `keeper_pid` and a starter take the lock for an instant to see whether somebody has it.
_LOCK_SECONDS = 5.0

log = logging.getLogger("tidemark.keeper")


class Keeper:
    """Two servers, and the watch over who uses them."""

    def __init__(self, places: Places, linger: float) -> None:
        self._places = places
        self._linger = linger
        self._users = FileLock(places.users_lock)
        self._stopping = False
        self._pause = 0.0
        self._retry_at = 0.0

    def run(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            with (
                PostgresServer.start(self._places.directory / "postgres") as postgres,
                RedisServer.start(self._places.directory / "redis") as redis,
            ):
                self._publish(postgres, redis)
                self._watch(postgres, redis)
                self._places.withdraw()
                log.info("stopping the servers")
        finally:
            self._places.withdraw()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Only take a note: raising here could break off a start half-way."""
        del frame
        log.info("received %s", signal.Signals(number).name)
        self._stopping = True

    def _publish(self, postgres: PostgresServer, redis: RedisServer) -> None:
        self._places.publish(Endpoints(database_url=postgres.url(), broker_url=redis.url))
        log.info("postgres (pid %d) and redis (pid %d) are ready", postgres.pid, redis.pid)

    def _watch(self, postgres: PostgresServer, redis: RedisServer) -> None:
        """Return when asked to, or when the servers went unused for the linger time.

        In the second case with the users' lock held: until this process has ended, no user can come in.
        """
        used_at = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if not self._users.try_acquire():
                used_at = now
            elif now - used_at >= self._linger:
                log.info("nobody has used the servers for %g s", self._linger)
                return
            else:
                self._users.release()
            self._revive(postgres, redis)
            time.sleep(_TICK)

    def _revive(self, postgres: PostgresServer, redis: RedisServer) -> None:
        dead = [server for server in (postgres, redis) if not server.running]
        if not dead or time.monotonic() < self._retry_at:
            return
        # Who attaches now waits until both answer again.
        self._places.withdraw()
        try:
            for server in dead:
                log.warning("%s (pid %d) is gone: starting it again", server.program, server.pid)
                server.restart()
        except EmbeddedServerError:
            self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE)
            self._retry_at = time.monotonic() + self._pause
            log.exception("next attempt in %g s", self._pause)
        else:
            self._pause = 0.0
            self._publish(postgres, redis)


def main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    places = Places(directory=Path(arguments[0]))
    linger = float(arguments[1]) if len(arguments) > 1 else LINGER_SECONDS
    lock = FileLock(places.keeper_lock)
    if not lock.acquire(time.monotonic() + _LOCK_SECONDS):
        log.error("another keeper runs in %s", places.directory)
        return 1
    if os.fork():
        # Who started us gets on with its work and knows that the lock is taken: our child has inherited it.
        os._exit(0)
    places.keeper_lock.write_text(str(os.getpid()), encoding="ascii")
    try:
        Keeper(places, linger).run()
    except EmbeddedServerError as error:
        log.error("%s", error)  # noqa: TRY400 -- the message is for whoever attached; a traceback would bury it
        return 1
    except Exception:
        log.exception("the keeper failed")
        return 1
    finally:
        lock.release()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
