"""Sharing an embedded server among processes that know nothing of each other.

A worker, beat and a command line each call `attach`. The keeper owns the server; it is a process of its own, `python
-m config.embedded.keeper postgres|redis DIRECTORY LINGER_SECONDS`. It leaves by itself when the last user has left;
SIGTERM and SIGINT end it, and the server, at once. Postgres and Redis have a directory and a keeper each, so that only
what is needed runs. Three locks in the directory, always taken in this order:

- `users.lock`: shared by every user while it lives. The keeper turns the server off only while it holds it
  exclusively, so an `attach` that comes in that moment waits until it is off, and then starts it again.
- `start.lock`: held by the one `attach` that looks for the keeper or starts it.
- `owner.lock`: held by the keeper while it lives.

A crash leaves behind: of a user, nothing (the kernel drops its lock, and the keeper notices); of a starter, at most a
keeper without users, which goes by itself; of the keeper, the file `url` and a running server. The next `attach`
starts a new keeper, which replaces it at the same URL.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Literal

import config
from config.embedded.host import FileLock, claim, open_log, tail, write_private
from config.embedded.postgres import PostgresServer
from config.embedded.redis import RedisServer
from config.embedded.server import OWNER_LOCK
from config.errors import EmbeddedServerError

ServerName = Literal["postgres", "redis"]

# More than a program takes to start: `worker --detach` closes all files and then starts itself a second time.
_LINGER_SECONDS = 10.0
_START_SECONDS = 180.0
_RENEW_SECONDS = 5.0
_LONGEST_PAUSE = 30.0
_POLL = 0.02
_TICK = 0.2

log = logging.getLogger("tidemark.embedded")


class Place:
    """The directory of a server, and the files in it by which users and keeper find each other."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.users_lock = directory / "users.lock"
        self.log = directory / "keeper.log"
        self.published = directory / "url"

    @property
    def kept(self) -> bool:
        """Whether a keeper lives."""
        lock = FileLock(self.directory / OWNER_LOCK)
        free = lock.try_acquire()
        lock.release()
        return not free

    @property
    def url(self) -> str | None:
        """The server's URL while the server runs."""
        with suppress(FileNotFoundError):
            return self.published.read_text(encoding="utf-8")
        return None


class Lease:
    """The right to use a server until `close`, or until this process and all it forked are gone."""

    def __init__(self, place: Place, url: str, users: FileLock) -> None:
        self.url = url
        self._place = place
        self._users = users
        # A daemon closes every file when it detaches itself (`beat --detach`), and runs these right after.
        register_after_fork(self, Lease._renew)

    def runs(self) -> bool:
        """Whether the server runs; False while its keeper starts it again. Without a keeper nobody does: an error."""
        if not self._place.kept:
            raise EmbeddedServerError(
                f"The embedded server in {self._place.directory} has lost its keeper ({self._place.log} may say why): "
                f"start this program again"
            )
        return self._place.url is not None

    def close(self) -> None:
        """Leave. Forked children that still live keep the server running."""
        self._users.release(ours_only=True)

    def _renew(self) -> None:
        held = self._users.held
        # The old one is not closed: the number of its file may be another file's by now.
        self._users = FileLock(self._place.users_lock, shared=True)
        if held and not self._users.acquire(time.monotonic() + _RENEW_SECONDS):
            log.error("lost the lease on the embedded server in %s", self._place.directory)


def attach(data_dir: Path, server: ServerName, *, linger: float = _LINGER_SECONDS) -> Lease:
    """Return a lease on one of the data directory's servers, which runs when this returns.

    `linger` counts for the call that starts the keeper: the server outlives its last user by as many seconds.
    """
    place = Place(claim(claim(data_dir) / server))
    deadline = time.monotonic() + _START_SECONDS
    users = FileLock(place.users_lock, shared=True)
    start = FileLock(place.directory / "start.lock")
    try:
        if not (users.acquire(deadline) and start.acquire(deadline)):
            raise TimeoutError(f"not ready after {_START_SECONDS:g} s")  # noqa: TRY301 - an OSError, like a full disk's below
        url = _await_url(place, deadline) or _spawn_keeper(place, server, linger, deadline)
    except BaseException as error:
        users.release()
        if isinstance(error, OSError):
            raise _failed(place, f" ({error})") from error
        raise
    finally:
        start.release()
    return Lease(place, url, users)


def _await_url(place: Place, deadline: float) -> str | None:
    """Return what the keeper publishes, or None as soon as no keeper lives."""
    while place.kept:
        if (url := place.url) is not None:
            return url
        if time.monotonic() > deadline:
            raise TimeoutError("its keeper has not got it ready in time")
        time.sleep(_POLL)
    return None


def _spawn_keeper(place: Place, server: ServerName, linger: float, deadline: float) -> str:
    """Start a keeper; return its server's URL.

    It leaves our process tree: so it is nobody's zombie when it ends, and no signal to our process group reaches it.
    """
    # A killed keeper's; after this, whatever is published is the new one's.
    place.published.unlink(missing_ok=True)
    # We may run from a checkout that is not installed.
    path = [str(Path(config.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    with open_log(place.log) as output:
        # -P: the working directory is a data directory, no place to import from.
        process = subprocess.run(
            [sys.executable, "-P", "-m", "config.embedded.keeper", server, place.directory, str(linger)],
            check=False,
            cwd=place.directory,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    if process.returncode == 0 and (url := _await_url(place, deadline)) is not None:
        return url
    raise _failed(place)


def _failed(place: Place, why: str = "") -> EmbeddedServerError:
    return EmbeddedServerError(f"The embedded server in {place.directory} did not start{why}:\n{tail(place.log)}")


class Keeper:
    """A server, and the watch over who uses it."""

    def __init__(self, server: PostgresServer | RedisServer, directory: Path, linger: float) -> None:
        self._server = server
        self._place = Place(directory)
        self._linger = linger
        self._users = FileLock(self._place.users_lock)
        self._stopping = False
        self._pause = 0.0

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
            return _log_error(error)
        finally:
            self._place.published.unlink(missing_ok=True)
            self._server.stop()

    def _on_signal(self, number: int, _: object) -> None:
        """Only take a note: raising here could break off a start half-way."""
        log.info("received %s", signal.Signals(number).name)
        self._stopping = True

    def _publish(self) -> None:
        server = self._server
        write_private(self._place.published, server.url() if isinstance(server, PostgresServer) else server.url)
        log.info("%s (pid %d) is ready", server.program, server.pid)

    def _watch(self) -> None:
        """Return when asked to, or when the server went unused for the linger time.

        In the second case with the users' lock held: until this process has ended, no user can come in.
        """
        used_at = retry_at = time.monotonic()
        while not self._stopping:
            now = time.monotonic()
            if not self._users.try_acquire():
                used_at = now
            elif now - used_at >= self._linger:
                log.info("nobody has used the server for %g s", self._linger)
                return
            else:
                self._users.release()
            if now >= retry_at:
                self._revive()
                retry_at = time.monotonic() + self._pause
            time.sleep(_TICK)

    def _revive(self) -> None:
        """Start a server again that has ended. A full disk, too, is only a reason to try once more, after a pause."""
        server = self._server
        try:
            if server.running and self._place.url is not None:
                return
            # Who attaches now waits until it answers again.
            self._place.published.unlink(missing_ok=True)
            if not server.running:
                log.warning("%s (pid %d) is gone: starting it again", server.program, server.pid)
                server.restart()
            self._publish()
            self._pause = 0.0
        except (EmbeddedServerError, OSError) as error:
            self._pause = min(2 * self._pause + 1, _LONGEST_PAUSE)
            _log_error(f"{server.program}: {error}; next attempt in {self._pause:g} s")


def _log_error(why: object) -> int:
    log.error("%s", why)  # no traceback, which would bury the message
    return 1


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
        return _log_error(error)
    return Keeper(server, Path(directory), float(linger)).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
