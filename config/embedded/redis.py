"""An embedded Redis on a port of 127.0.0.1, behind a random password.

TCP, because a password in a URL is understood by every client the broker's URL is handed to. The password
stands in 0600 files only: everybody can read a command line.
"""

import re
import secrets
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from config.embedded.host import redis_binary, write_private
from config.embedded.server import EmbeddedServer
from config.errors import EmbeddedServerError

# Below the ports the kernel hands to outgoing connections (from 32768 on Linux, 49152 on macOS): one of those could
# take ours while the server restarts.
_FIRST_PORT, _PORTS = 20_000, 12_000
_ATTEMPTS = 20
_ANSWER_SECONDS = 0.3
_HOST = "127.0.0.1"

# `dir` is not among them: the server works in the directory it is started in, whatever characters its path has.
_CONF = """\
bind {host}
port {port}
requirepass {password}
daemonize no
# A queue's messages must outlive a restart, at the price of the last second's.
appendonly yes
appendfsync everysec
# The append-only file is enough; snapshots would fork and write it all again.
save ""
# A broker must refuse a message rather than drop another.
maxmemory-policy noeviction
tcp-backlog 128
"""


class RedisServer(EmbeddedServer):
    """A Redis in `directory`; port and password stay the same as long as the directory exists."""

    program: ClassVar[str] = "redis-server"
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    start_seconds: ClassVar[float] = 60  # includes reading the append-only file
    stop_seconds: ClassVar[float] = 20

    def __init__(self, directory: Path, *, binary: Path | None = None) -> None:
        """`binary` is a `redis-server` (default: the wheel's)."""
        super().__init__(directory, binary or redis_binary())
        self._conf = self._directory / "redis.conf"
        self._port = 0
        self._password = ""

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@{_HOST}:{self._port}/0"

    def _prepare(self) -> list[str | Path]:
        self._data.mkdir(0o700, exist_ok=True)
        self._account.take(self._data)
        if not self._port:  # a restart keeps it, for the clients that know it
            self._choose()
        text = _CONF.format(host=_HOST, port=self._port, password=self._password)
        write_private(self._conf, text, owner=self._account)
        return [self._binary, self._conf]

    def _is_ready(self, pid: int) -> bool:
        """Whether the server we mean answers: another one on this port would not take the password."""
        del pid
        with suppress(OSError), socket.create_connection((_HOST, self._port), _ANSWER_SECONDS) as connection:
            connection.sendall(f"AUTH {self._password}\r\nPING\r\nQUIT\r\n".encode())
            # Not so while it loads: -LOADING.
            return b"+PONG" in b"".join(iter(lambda: connection.recv(4096), b""))
        return False

    def _choose(self) -> None:
        """Take the password and the port of the last run, or else a new password and a free port."""
        ports = [_FIRST_PORT + secrets.randbelow(_PORTS) for _ in range(_ATTEMPTS)]
        self._password = secrets.token_urlsafe(24)
        with_values = r'^port (\d+)\nrequirepass "?([\w-]+)"?$'
        if self._conf.exists() and (found := re.search(with_values, self._conf.read_text("utf-8"), re.MULTILINE)):
            ports.insert(0, int(found[1]))
            self._password = found[2]
        for self._port in ports:
            with suppress(OSError), socket.create_server((_HOST, self._port)):
                return
        raise EmbeddedServerError(f"Found no free port for Redis on {_HOST} in {_ATTEMPTS} attempts")
