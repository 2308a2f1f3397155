"""A RabbitMQ of the tests' own: node, data, logs, cookie and port mapper apart from any other, on 127.0.0.1 only."""

import shutil
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

import kombu

from tests.demo.programs import Process, free_port
from tests.support import wait_until

# Not the wrapper in /usr/sbin, which changes to the directories and the user of the system's own server.
_PLACES = (
    "/usr/lib/rabbitmq/bin/rabbitmq-server",
    "/usr/local/sbin/rabbitmq-server",
    "/opt/homebrew/sbin/rabbitmq-server",
)
_START_SECONDS = 80.0
TLS = Path(__file__).parent / "tls"
_USER, _PASSWORD = "tidemark", "mQ7rT2vXp9sLw4Zk"


def find_program() -> str | None:
    """Path of rabbitmq-server; None where it is not installed."""
    found = next((place for place in _PLACES if Path(place).exists()), None)
    return found or shutil.which("rabbitmq-server")


class RabbitServer:
    """Two processes: Erlang's port mapper, which would otherwise stay behind as a daemon, and the broker."""

    def __init__(self, program: str, directory: Path) -> None:
        self._stack = ExitStack()
        self._ports = {name: free_port() for name in ("amqp", "amqps", "distribution", "epmd")}
        directory.mkdir()
        lines = [
            f"listeners.tcp.default = 127.0.0.1:{self._ports['amqp']}",
            f"listeners.ssl.default = 127.0.0.1:{self._ports['amqps']}",
            f"ssl_options.certfile = {TLS / 'server.pem'}",
            f"ssl_options.keyfile = {TLS / 'server.pem'}",
            f"default_user = {_USER}",
            f"default_pass = {_PASSWORD}",
        ]
        (directory / "rabbitmq.conf").write_text("\n".join([*lines, ""]))
        (directory / "enabled_plugins").write_text("[].\n")
        env = {
            "HOME": str(directory),  # the cookie
            "ERL_EPMD_PORT": str(self._ports["epmd"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"tidemark-{uuid4().hex[:8]}@localhost",
            "RABBITMQ_DIST_PORT": str(self._ports["distribution"]),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "ERL_CRASH_DUMP": str(directory / "erl_crash.dump"),
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
        }
        epmd = shutil.which("epmd") or "epmd"
        mapper = Process([epmd, "-port", env["ERL_EPMD_PORT"], "-address", "127.0.0.1"], env, directory / "epmd.log")
        self._stack.callback(mapper.close)
        self._broker = Process([program], env, directory / "rabbitmq.log")
        self._stack.callback(self._broker.close)

    @property
    def url(self) -> str:
        return f"amqp://{_USER}:{_PASSWORD}@127.0.0.1:{self._ports['amqp']}//"

    def tls_url(self, *, host: str = "127.0.0.1", password: str = _PASSWORD) -> str:
        """The certificate is for 127.0.0.1, by the authority in tls/ca.pem."""
        return f"amqps://{_USER}:{password}@{host}:{self._ports['amqps']}//"

    @property
    def running(self) -> bool:
        return self._broker.running

    def wait_until_ready(self) -> None:
        def rabbitmq_answers() -> bool:
            assert self._broker.running, self._broker.output()
            try:
                with kombu.Connection(self.url, connect_timeout=1) as connection:
                    connection.connect()
            except (OSError, kombu.exceptions.KombuError):
                return False
            return True

        wait_until(rabbitmq_answers, timeout=_START_SECONDS, interval=0.2)

    def delete_queues(self, names: list[str]) -> None:
        with kombu.Connection(self.url) as connection:
            for name in names:
                connection.default_channel.queue_delete(name)

    def kill(self) -> None:
        self._broker.kill()

    def stop(self) -> None:
        self._broker.end()

    def restart(self) -> None:
        self._broker.restart()
        self.wait_until_ready()

    def close(self) -> None:
        self._stack.close()
