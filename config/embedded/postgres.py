"""An embedded PostgreSQL, reached through a Unix socket only.

Authentication is `trust` behind the socket's directory, which is 0700: whoever can enter it is the server's own
account or root, and either could read the data files anyway, so a password would guard nothing. `peer` would
shut root out, whose server runs as `nobody`. The directory lies in /tmp because a socket's path may have 107
bytes, and a data directory's path has as many as it likes.
"""

import re
import shutil
import signal
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar
from urllib.parse import quote

import config
from config.embedded.host import postgres_bin, write_private
from config.embedded.server import EmbeddedServer
from config.errors import EmbeddedServerError

_USER = "tidemark"
_DATABASE = "tidemark"
_SERVER_CONF = Path(config.__file__).with_name("postgresql.conf")

# A developer's machine has other things to do than this server.
_SMALLER = {
    "shared_buffers": "128MB",
    "effective_cache_size": "1GB",
    "work_mem": "16MB",
    "maintenance_work_mem": "64MB",
    "max_wal_size": "1GB",
    "min_wal_size": "80MB",
}


class PostgresServer(EmbeddedServer):
    """A cluster in `directory`, with the superuser and the database `tidemark`."""

    program: ClassVar[str] = "postgres"
    stop_signal: ClassVar[signal.Signals] = signal.SIGINT  # "fast": open transactions roll back
    start_seconds: ClassVar[float] = 120  # includes crash recovery
    stop_seconds: ClassVar[float] = 60  # includes a checkpoint

    def __init__(
        self, directory: Path, *, bin_dir: Path | None = None, settings: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`bin_dir` holds `postgres` and `initdb` (default: the wheel's); `settings` go before `postgresql.conf`."""
        super().__init__(directory, (bin_dir or postgres_bin()) / self.program)
        self._settings = {**_SMALLER, **settings}
        self._socket_link = self._directory / "socket"
        self._socket_directory: Path | None = None

    def url(self, database: str = _DATABASE) -> str:
        """Return a URL that libpq, psycopg and SQLAlchemy understand.

        It names the port, since PGPORT in a client's environment would otherwise choose the socket's name.
        """
        if self._socket_directory is None:
            raise EmbeddedServerError(f"Postgres in {self._directory} was never started")
        host = quote(str(self._socket_directory), safe="")
        return f"postgresql://{_USER}@/{quote(database, safe='')}?host={host}&port=5432"

    def _prepare(self) -> list[str | Path]:
        (self._check_version if self._data.exists() else self._initialize)()
        self._socket_directory = self._find_socket_directory()
        # No process of this cluster is left, so these are stale; but the pid in them may be another process's by now
        # (or a zombie's, where nobody reaps orphans), and Postgres would refuse to start.
        for stale in (self._data / "postmaster.pid", *self._socket_directory.iterdir()):
            stale.unlink(missing_ok=True)
        # On every start: a new release's settings reach old data directories. The last line of a setting counts.
        quoted = {name: value.replace("\\", "\\\\").replace("'", "''") for name, value in self._settings.items()}
        ours = "".join(f"{name} = '{value}'\n" for name, value in quoted.items())
        text = f"{_SERVER_CONF.read_text(encoding='utf-8')}\n# --- Embedded\n\n{ours}"
        write_private(self._data / "postgresql.conf", text, owner=self._account)
        # On the command line, which beats the files and ALTER SYSTEM: the URL and the `trust` above rest on them.
        socket = [f"--unix_socket_directories={self._socket_directory}", "--unix_socket_permissions=0700"]
        return [self._binary, "-D", self._data, "--listen_addresses=", "--port=5432", *socket]

    def _is_ready(self, pid: int) -> bool:
        """Read what pg_ctl reads: no client library is needed, and a server in recovery is told from a ready one."""
        # As src/include/utils/pidfile.h says, the first line is the pid and the last one, once it is there, the status.
        with suppress(FileNotFoundError):
            lines = (self._data / "postmaster.pid").read_text(errors="replace").splitlines()
            return bool(lines) and lines[0] == str(pid) and lines[-1].strip() == "ready"
        return False

    def _clean_up(self) -> None:
        if self._socket_directory is not None:
            shutil.rmtree(self._socket_directory, ignore_errors=True)
        self._socket_link.unlink(missing_ok=True)

    def _check_version(self) -> None:
        try:
            found = (self._data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            raise EmbeddedServerError(
                f"{self._data} is not empty and no Postgres data directory: move it away, or choose another "
                f"TIDEMARK_DATA_DIR"
            ) from None
        printed = self._account.run([self._binary, "--version"]).stdout.strip()
        if re.findall(r"\d+", printed)[:1] != [found]:
            raise EmbeddedServerError(
                f"{self._data} was created by PostgreSQL {found}, and {self._binary} is {printed}: "
                f"dump and restore it with the old binaries, or choose another TIDEMARK_DATA_DIR"
            )

    def _initialize(self) -> None:
        """Create the cluster beside its place and move it there whole: a crash half-way leaves nothing to repair."""
        unfinished = self._data.with_suffix(".new")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(0o700)
        self._account.take(unfinished)
        # --pgdata=. because initdb refuses some characters that the directory's path may have. --auth-host: nobody
        # listens on TCP; should somebody change that, it stays shut.
        options = [f"--username={_USER}", "--encoding=UTF8", "--locale=C", "--auth-local=trust", "--auth-host=reject"]
        if self._settings.get("fsync") == "off":
            options.append("--no-sync")
        # Single-user mode needs no client, and goes on after an error unless told not to.
        single = ["--single", "-D", ".", "-c", "exit_on_error=on", "template1"]
        for stdin, program, *arguments in (
            ("", "initdb", "--pgdata=.", *options),
            (f"CREATE DATABASE {_DATABASE}\n", "postgres", *single),
        ):
            done = self._account.run([self._binary.with_name(program), *arguments], directory=unfinished, stdin=stdin)
            if done.returncode != 0:
                raise EmbeddedServerError(f"{program} failed (exit code {done.returncode}):\n{done.stdout.strip()}")
        unfinished.rename(self._data)

    def _find_socket_directory(self) -> Path:
        """Reuse what a killed run left, so that its clients' URL stays right and nothing piles up in /tmp.

        Everybody may write to /tmp: what is not a private directory of our account is not ours.
        """
        with suppress(OSError):
            known = self._socket_link.readlink()
            status = known.lstat()
            if status.st_mode == stat.S_IFDIR | stat.S_IRWXU and status.st_uid == self._account.uid:
                return known
        created = Path(tempfile.mkdtemp(prefix="tm-", dir="/tmp"))
        self._account.take(created)
        self._socket_link.unlink(missing_ok=True)
        self._socket_link.symlink_to(created)
        return created
