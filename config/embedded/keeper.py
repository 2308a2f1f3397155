"""The process that owns an embedded server: `python -m config.embedded.keeper postgres|redis DIRECTORY LINGER_SECONDS`.

Started by `config.embedded.attach`, whose module explains the locks. It leaves by itself when the last user has
left; SIGTERM and SIGINT end it, and the server, at once.
"""

import logging
import os
import signal
import sys
import time
from pathlib import Path

from config.embedded.host import FileLock
from config.embedded.lease import Place
from config.embedded.postgres import PostgresServer
from config.embedded.redis import RedisServer
from config.errors import EmbeddedServerError

_TICK = 0.2
_LONGEST_PAUSE = 30.0

log = logging.getLogger("tidemark.keeper")


class Keeper:
    """A server, and the watch over who uses it."""

    def __init__(self, server: PostgresServer | RedisServer, directory: Path, linger: float) -> None:
        self._server = server
        self._place = Place(directory)
        self._linger = linger
        self._users = FileLock(self._place.users_lock)
        self._stopping = False
        self._pause = 0.0
        self._retry_at = 0.0

    def run(self) -> int:
        """Return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        try:
            self._server.launch()
            self._publish()
            self._watch()
            log.info("stopping %s", self._server.program)
            return 0
        except (EmbeddedServerError, OSError) as error:
            # Before the lock goes: whoever attaches reads it as soon as nobody has the lock.
            log.error("%s", error)  # noqa: TRY400 - a traceback would bury the message
            return 1
        finally:
            self._place.withdraw()
            self._server.stop()

    def _on_signal(self, number: int, _: object) -> None:
        """Only take a note: raising here could break off a start half-way."""
        log.info("received %s", signal.Signals(number).name)
        self._stopping = True

    def _publish(self) -> None:
        server = self._server
        self._place.publish(server.url() if isinstance(server, PostgresServer) else server.url)
        log.info("%s (pid %d) is ready", server.program, server.pid)

    def _watch(self) -> None:
        """Return when asked to, or when the server went unused for the linger time.

        In the second case with the users' lock held: until this process has ended, no user can come in.
        """
        used_at = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if not self._users.try_acquire():
                used_at = now
            elif now - used_at >= self._linger:
                log.info("nobody has used the server for %g s", self._linger)
                return
            else:
                self._users.release()
            if now >= self._retry_at:
                self._revive()
            time.sleep(_TICK)

    def _revive(self) -> None:
        """Start a server again that has ended. A full disk, too, is only a reason to try once more, later."""
        server = self._server
        if server.running and self._place.url is not None:
            return
        try:
            # Who attaches now waits until it answers again.
            self._place.withdraw()
            if not server.running:
                log.warning("%s (pid %d) is gone: starting it again", server.program, server.pid)
                server.restart()
            self._publish()
        except (EmbeddedServerError, OSError) as error:
            self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE)
            self._retry_at = time.monotonic() + self._pause
            what = f"{server.program}: {error}; next attempt in {self._pause:g} s"
            log.error("%s", what)  # noqa: TRY400 - a traceback would bury it
        else:
            self._pause = 0.0


def main(arguments: list[str]) -> int:
    name, directory, linger = arguments
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s [%(process)d] %(message)s")
    try:
        server = {"postgres": PostgresServer, "redis": RedisServer}[name](Path(directory))
        server.own()
        if os.fork():
            # Who started us gets on with its work and knows that the lock is taken: our child has inherited it.
            os._exit(0)
    except (EmbeddedServerError, OSError) as error:
        log.error("%s", error)  # noqa: TRY400 - as above
        return 1
    return Keeper(server, Path(directory), float(linger)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
