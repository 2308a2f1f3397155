"""Sharing the embedded servers among processes that know nothing of each other.

A worker, beat and a command line each call `attach`; the keeper (`config.embedded.keeper`), a process of its own, owns
the servers. Three locks in the directory, always taken in this order:

- `users.lock`: shared by every user while it lives. The keeper turns the servers off only while it holds it
  exclusively, so an `attach` that comes in that moment waits until they are off, and then starts them anew.
- `start.lock`: held by the one `attach` that looks for the keeper or starts it.
- `keeper.lock`: held by the keeper while it lives; its content is the keeper's pid.

A crash leaves behind: of a user, nothing (the kernel drops its lock, and the keeper notices); of a starter, at most a
keeper without users, which goes by itself; of the keeper, `endpoints.json` and two running servers. The next
`attach` starts a new keeper, which replaces them at the same URLs.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import config
from config.embedded.account import claim
from config.embedded.files import open_log, tail, write_private
from config.embedded.locks import FileLock
from config.errors import EmbeddedServerError

LINGER_SECONDS = 2.0
_START_SECONDS = 180.0
_POLL = 0.02


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    database_url: str
    broker_url: str


@dataclass(frozen=True, kw_only=True)
class Places:
    """The files by which users and keeper of a directory find each other."""

    directory: Path

    @property
    def users_lock(self) -> Path:
        return self.directory / "users.lock"

    @property
    def start_lock(self) -> Path:
        return self.directory / "start.lock"

    @property
    def keeper_lock(self) -> Path:
        return self.directory / "keeper.lock"

    @property
    def log(self) -> Path:
        return self.directory / "keeper.log"

    def publish(self, endpoints: Endpoints) -> None:
        write_private(self.directory / "endpoints.json", json.dumps(asdict(endpoints)))

    def published(self) -> Endpoints | None:
        try:
            return Endpoints(**json.loads((self.directory / "endpoints.json").read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def withdraw(self) -> None:
        (self.directory / "endpoints.json").unlink(missing_ok=True)


class Lease:
    """The right to use the servers until `close`, or until this process and all it forked are gone."""

    def __init__(self, endpoints: Endpoints, users: FileLock) -> None:
        self.endpoints = endpoints
        self._users = users

    def close(self) -> None:
        """Leave. Forked children that still live keep the servers running."""
        self._users.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def attach(directory: Path, *, linger: float = LINGER_SECONDS, timeout: float = _START_SECONDS) -> Lease:
    """Return a lease on the directory's servers, which run when this returns.

    `linger` counts for the call that starts the keeper: so long the servers outlive their last user.
    """
    places = Places(directory=claim(directory))
    deadline = time.monotonic() + timeout
    users = FileLock(places.users_lock, shared=True)
    if not users.acquire(deadline):
        raise _too_late(places, timeout)
    start = FileLock(places.start_lock)
    try:
        if not start.acquire(deadline):
            raise _too_late(places, timeout)  # noqa: TRY301 -- the lock above must go, whatever the reason
        endpoints = _find_or_start(places, linger, deadline, timeout)
    except BaseException:
        users.release()
        raise
    finally:
        start.release()
    return Lease(endpoints, users)


def keeper_pid(directory: Path) -> int | None:
    """Return the pid of the directory's keeper, or None when none runs."""
    places = Places(directory=directory)
    if not places.keeper_lock.exists() or not _keeper_runs(places):
        return None
    return int(places.keeper_lock.read_text(encoding="ascii") or 0) or None


def _find_or_start(places: Places, linger: float, deadline: float, timeout: float) -> Endpoints:
    endpoints = _await_keeper(places, deadline, timeout)
    if endpoints is None:
        _spawn_keeper(places, linger)
        endpoints = _await_keeper(places, deadline, timeout)
    if endpoints is None:
        raise _failed(places)
    return endpoints


def _await_keeper(places: Places, deadline: float, timeout: float) -> Endpoints | None:
    """Return what the running keeper has published, or None as soon as no keeper runs."""
    while _keeper_runs(places):
        if (endpoints := places.published()) is not None:
            return endpoints
        if time.monotonic() > deadline:
            raise _too_late(places, timeout)
        time.sleep(_POLL)
    return None


def _keeper_runs(places: Places) -> bool:
    lock = FileLock(places.keeper_lock)
    if lock.try_acquire():
        lock.release()
        return False
    return True


def _spawn_keeper(places: Places, linger: float) -> None:
    """Start a keeper; on return it holds its lock and has left our process tree.

    So it is nobody's zombie when it ends, and no signal to our process group reaches it.
    """
    # A killed keeper's endpoints; after this, whatever is published is the new one's.
    places.withdraw()
    log = open_log(places.log)
    try:
        # -P: the working directory is a data directory, no place to import from. The path to ourselves: we may run
        # from a checkout that is not installed.
        process = subprocess.run(
            [sys.executable, "-P", "-m", "config.embedded.keeper", places.directory, str(linger)],
            check=False,
            cwd=places.directory,
            env={**os.environ, "PYTHONPATH": _python_path()},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    finally:
        os.close(log)
    if process.returncode != 0:
        raise _failed(places)


def _python_path() -> str:
    ours = str(Path(config.__file__).parents[1])
    return os.pathsep.join([ours, *filter(None, [os.environ.get("PYTHONPATH")])])


def _failed(places: Places) -> EmbeddedServerError:
    return EmbeddedServerError(f"The embedded servers in {places.directory} did not start:\n{tail(places.log)}")


def _too_late(places: Places, timeout: float) -> EmbeddedServerError:
    return EmbeddedServerError(
        f"The embedded servers in {places.directory} were not ready after {timeout:g} s:\n{tail(places.log)}"
    )
