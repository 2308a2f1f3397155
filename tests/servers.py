"""The embedded servers as tests, demo and benchmarks use them: run by this process, without a keeper, and crashed."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import psycopg

from config.embedded import postgres, redis
from config.embedded.host import Account, runnable
from config.embedded.host import postgres_bin as wheel_bin
from config.embedded.server import EmbeddedServer
from tests.support import wait_until

_MEMORY = Path("/dev/shm")
_MUCH = 8 << 30


@contextmanager
def directory_for_servers() -> Iterator[Path]:
    """A new directory which the user that servers run as may enter. As root, pytest's own are closed to it.

    It is in memory where 8 GiB are free there and programs may run. On a disk, making a database for each test would
    take a third of the time of those that need one.
    """
    where = None
    if _MEMORY.is_dir():
        status = os.statvfs(_MEMORY)
        if status.f_bavail * status.f_frsize >= _MUCH and not status.f_flag & os.ST_NOEXEC:
            where = _MEMORY
    path = Path(tempfile.mkdtemp(prefix="tm-test-", dir=where)).resolve()
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


class OwnServer(EmbeddedServer):
    def start(self) -> Self:
        """Own it and launch it, or leave nothing behind; for `with`, which stops it."""
        self.own()
        try:
            self.launch()
        except BaseException:
            self.stop()
            raise
        return self

    def kill(self) -> None:
        """Crash: SIGKILL to the server and all its children. `restart` or another `start` recovers."""
        if self._owner.held:  # otherwise what runs there is another owner's
            self._kill_all()
            self._owner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class PostgresServer(OwnServer, postgres.PostgresServer): ...


class Standby(PostgresServer):
    """Ready as soon as it can be read."""

    def _is_ready(self, pid: int) -> bool:
        with suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text().splitlines()
            return len(lines) > 7 and lines[0] == str(pid) and lines[7].strip() in {"standby", "ready"}
        return False


def copied(primary: PostgresServer, directory: Path, bin_dir: Path | None, settings: Mapping[str, str]) -> Standby:
    """A standby named `mirror`, which follows from a base backup on."""
    account = Account.for_servers()
    data = directory / "data"
    directory.mkdir(0o711)
    data.mkdir(0o700)
    account.take(data)
    program = (bin_dir or wheel_bin()) / "postgres"
    backup = runnable(program, account, directory).with_name("pg_basebackup")
    source = f"{primary.url()}&application_name=mirror"
    done = account.run([backup, "-D", data, "-d", source, "--checkpoint=fast", "--no-sync", "-R", "-X", "stream"])
    assert done.returncode == 0, done.stdout
    return Standby(directory, bin_dir=bin_dir, settings=settings).start()


def synchronize(primary: psycopg.Connection[Any]) -> None:
    """Let the primary wait for its standby, once that one is up to date."""
    primary.execute("alter system set synchronous_standby_names = 'mirror'")
    primary.execute("select pg_reload_conf()")

    def is_synchronous() -> bool:
        return primary.execute("select sync_state from pg_stat_replication").fetchall() == [("sync",)]

    wait_until(is_synchronous)


class RedisServer(OwnServer, redis.RedisServer): ...
