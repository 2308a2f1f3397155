"""Containers with the interface of the local programs and servers, so that the same tests run on both.

`ContainerProcess` stands in for `tests.demo.programs.Process`, `PostgresContainer` and `RedisContainer` for the
embedded servers. Servers are reached from here through a port on the loopback address, from other containers by name.
"""

import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

import docker  # type: ignore[import-untyped]  # ships no types
import psycopg
from docker.errors import APIError, NotFound  # type: ignore[import-untyped]  # ships no types
from redis import Redis, RedisError

from tests.demo.programs import free_port

# Generous: an engine may run on a small machine, and unpack an image first.
_START_SECONDS = 60.0
_END_SECONDS = 30
# Every container of a test run carries it, with the run's number.
LABEL = "tidemark.test"
_SECRET = secrets.token_urlsafe(12)


class NoEngineError(Exception):
    """No Docker engine answers."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A Docker engine, a network of ours in it, and the image under test."""

    client: Any
    network: Any
    image: str
    run: str

    @classmethod
    def connect(cls) -> Any:
        """A client of the engine that DOCKER_HOST names; raises NoEngineError where none answers."""
        url = urlsplit(os.environ.get("DOCKER_HOST", "unix:///var/run/docker.sock"))
        # Tried first without the SDK, which leaves a socket open that could not connect.
        with socket.socket(socket.AF_UNIX if url.scheme == "unix" else socket.AF_INET) as probe:
            try:
                probe.connect(url.path if url.scheme == "unix" else (url.hostname, url.port or 2375))
            except OSError as error:
                raise NoEngineError(f"{url.geturl()}: {error.strerror}") from None
        return docker.from_env(timeout=120)

    def start(self, name: str, image: str, command: Sequence[str], **options: Any) -> Any:
        """Start a container as compose.yaml starts them: no rights, nothing writable but what is said."""
        return self.client.containers.run(
            image,
            list(command),
            detach=True,
            init=True,
            name=f"tidemark-test-{self.run}-{name}",
            hostname=name,
            network=self.network.name,
            labels={LABEL: self.run},
            read_only=True,
            cap_drop=["ALL"],
            security_opt=["no-new-privileges:true"],
            **options,
        )

    def remove(self) -> None:
        """Remove what a test run has started, whatever became of it."""
        for container in self.client.containers.list(all=True, filters={"label": f"{LABEL}={self.run}"}):
            with suppress(NotFound):
                container.remove(force=True, v=True)
        self.network.remove()


class ContainerProcess:
    """One of Tidemark's programs in a container."""

    def __init__(self, engine: Engine, name: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.env = dict(env)
        self.name = name
        self._container = engine.start(
            name,
            engine.image,
            arguments,
            environment=self.env,
            tmpfs={"/tmp": "mode=1777,size=64m", "/var/lib/tidemark": "uid=10001,gid=10001,mode=0700,size=16m"},
        )

    @property
    def container(self) -> Any:
        return self._container

    @property
    def pid(self) -> int:
        self._container.reload()
        return int(self._container.attrs["State"]["Pid"])

    @property
    def returncode(self) -> int | None:
        self._container.reload()
        state = self._container.attrs["State"]
        return None if state["Running"] else int(state["ExitCode"])

    @property
    def running(self) -> bool:
        return self.returncode is None

    def output(self) -> str:
        return bytes(self._container.logs()).decode(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        self._container.kill(signal=number.name)

    def wait(self, timeout: float = _END_SECONDS) -> int:
        return int(self._container.wait(timeout=timeout)["StatusCode"])

    def kill(self) -> None:
        with suppress(APIError):  # it has ended already
            self._container.kill()
        self.wait()

    def end(self) -> None:
        self._container.stop(timeout=_END_SECONDS)

    def restart(self) -> None:
        self._container.restart(timeout=_END_SECONDS)

    def close(self) -> None:
        with suppress(NotFound):
            self._container.remove(force=True, v=True)


class _ServerContainer:
    """A server in a container. A restart keeps its port, so that its URL stays true."""

    def __init__(self, engine: Engine, name: str, image: str, command: Sequence[str], **options: Any) -> None:
        self.name = name
        self.inner_port = options.pop("inner_port")
        # Docker would give another free port at every restart.
        self.port = free_port()
        self._container = engine.start(
            name, image, command, ports={f"{self.inner_port}/tcp": ("127.0.0.1", self.port)}, **options
        )
        self._wait_until_it_answers()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(NotFound):
            self._container.remove(force=True, v=True)

    @property
    def running(self) -> bool:
        self._container.reload()
        return bool(self._container.attrs["State"]["Running"])

    @property
    def pid(self) -> int:
        self._container.reload()
        return int(self._container.attrs["State"]["Pid"])

    def kill(self) -> None:
        self._container.kill()
        self._container.wait(timeout=_END_SECONDS)

    def stop(self) -> None:
        self._container.stop(timeout=_END_SECONDS)

    def restart(self) -> None:
        self._container.restart(timeout=_END_SECONDS)
        self._wait_until_it_answers()

    def inside(self, url: str) -> str:
        """The URL as another container says it."""
        return url.replace(f"@127.0.0.1:{self.port}", f"@{self.name}:{self.inner_port}")

    def answers(self) -> bool:
        raise NotImplementedError

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not self.answers():
            if time.monotonic() > deadline:
                log = bytes(self._container.logs(tail=20)).decode(errors="replace")
                raise TimeoutError(f"{self.name} does not answer after {_START_SECONDS:g} s:\n{log}")
            time.sleep(0.1)


class PostgresContainer(_ServerContainer):
    """A Postgres from compose.yaml's image, started as there."""

    def __init__(self, engine: Engine, name: str, image: str, settings: Mapping[str, str]) -> None:
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        super().__init__(
            engine,
            name,
            image,
            ["postgres", "-c", "listen_addresses=*", *options],
            inner_port=5432,
            user="postgres",
            environment={
                "POSTGRES_USER": "tidemark",
                "POSTGRES_PASSWORD": _SECRET,
                "POSTGRES_INITDB_ARGS": "--auth-local=trust --auth-host=scram-sha-256",
            },
            volumes={f"tidemark-test-{engine.run}-{name}": {"bind": "/var/lib/postgresql", "mode": "rw"}},
            tmpfs={"/tmp": "mode=1777", "/run/postgresql": "mode=1777"},
            shm_size="256m",
        )
        self._volume = engine.client.volumes.get(f"tidemark-test-{engine.run}-{name}")

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._volume.remove()

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://tidemark:{_SECRET}@127.0.0.1:{self.port}/{database}"

    def answers(self) -> bool:
        try:
            psycopg.connect(self.url(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class RedisContainer(_ServerContainer):
    """A Redis from compose.yaml's image, which keeps its file over a crash."""

    def __init__(self, engine: Engine, name: str, image: str) -> None:
        command = f"exec redis-server --requirepass {_SECRET} --dir /data --appendonly yes"
        super().__init__(
            engine,
            name,
            image,
            ["sh", "-euc", command],
            inner_port=6379,
            user="redis",
            volumes={f"tidemark-test-{engine.run}-{name}": {"bind": "/data", "mode": "rw"}},
            tmpfs={"/tmp": "mode=1777"},
        )
        self._volume = engine.client.volumes.get(f"tidemark-test-{engine.run}-{name}")

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._volume.remove()

    @property
    def url(self) -> str:
        return f"redis://:{_SECRET}@127.0.0.1:{self.port}/0"

    def answers(self) -> bool:
        try:
            with Redis.from_url(self.url, socket_timeout=2, socket_connect_timeout=2) as client:
                return bool(client.ping())
        except RedisError:
            return False


def inside(servers: Sequence[_ServerContainer]) -> Callable[[str], str]:
    """Translates the URLs of these servers to what another container says."""

    def translate(url: str) -> str:
        port = urlsplit(url).port
        return next((server.inside(url) for server in servers if server.port == port), url)

    return translate
