"""pytest-celery's nodes over local processes.

pytest-celery's containers wrap an object of the Docker SDK. `ProcessContainer` and `ServerContainer` have the part of
that object's interface which is used, so the fixtures, nodes and clusters above them are pytest-celery's own.
"""

import shlex
import signal
import subprocess
from typing import Any, Protocol
from uuid import uuid4

import celery
from pytest_celery import CeleryTestContainer, CeleryTestWorker, CeleryWorkerContainer, RedisContainer

from tests.demo.programs import ROOT, Process


class Server(Protocol):
    """What the embedded servers have, and others that stand in for them."""

    @property
    def running(self) -> bool: ...

    def kill(self) -> None: ...

    def stop(self) -> None: ...

    def restart(self) -> None: ...


class _Container:
    """What pytest-celery reads of every container of the Docker SDK."""

    def __init__(self, name: str) -> None:
        self.id = uuid4().hex
        self.name = f"{name}-{self.id[:8]}"

    @property
    def attrs(self) -> dict[str, Any]:
        return {
            "Config": {"Hostname": "127.0.0.1", "Env": []},
            "HostConfig": {"PortBindings": {}},
            "NetworkSettings": {"Networks": {}, "Ports": {}},
        }

    def reload(self) -> None:
        """Nothing is cached."""


class ProcessContainer(_Container):
    """A container of one process."""

    def __init__(self, process: Process, name: str) -> None:
        super().__init__(name)
        self.process = process

    @property
    def status(self) -> str:
        return "running" if self.process.running else "exited"

    def logs(self, **_: Any) -> bytes:
        return self.process.output().encode()

    def kill(self, signal: str | int | None = None) -> None:
        number = _signal(signal)
        if number == _signal("SIGKILL"):
            self.process.kill()
            return
        self.process.signal(number)
        if number == _signal("SIGTERM"):
            self.process.wait()

    def restart(self, **_: Any) -> None:
        self.process.restart()

    def exec_run(self, cmd: str | list[str], **_: Any) -> tuple[int, bytes]:
        done = subprocess.run(
            shlex.split(cmd) if isinstance(cmd, str) else cmd,
            check=False,
            cwd=ROOT,
            env=self.process.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        return done.returncode, done.stdout


class ServerContainer(_Container):
    """A container of one server. Its fixture starts and ends it; a restart keeps its address."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(name)
        self._server = server

    @property
    def status(self) -> str:
        return "running" if self._server.running else "exited"

    def logs(self, **_: Any) -> bytes:
        return b""

    def kill(self, signal: str | int | None = None) -> None:
        if _signal(signal) == _signal("SIGKILL"):
            self._server.kill()
        else:
            self._server.stop()

    def restart(self, **_: Any) -> None:
        self._server.restart()


def _signal(name: str | int | None) -> signal.Signals:
    if name is None:
        return signal.SIGKILL
    return signal.Signals[name] if isinstance(name, str) else signal.Signals(name)


class LocalRedis(RedisContainer):
    """Redis as broker and backend, at the URL of an embedded server."""

    def __init__(self, server: Server, url: str) -> None:
        super().__init__(ServerContainer(server, "redis"))
        self._url = url

    @property
    def url(self) -> str:
        return self._url

    @property
    def host_url(self) -> str:
        return self._url

    @property
    def hostname(self) -> str:
        return "127.0.0.1"

    @property
    def port(self) -> int:
        return int(self._url.rsplit(":", 1)[1].split("/")[0])

    @property
    def ready_prompt(self) -> str | None:
        return None


class LocalBroker(CeleryTestContainer):
    """Any other broker that runs already, at a URL."""

    def __init__(self, container: _Container, url: str) -> None:
        super().__init__(container)
        self._url = url

    @property
    def celeryconfig(self) -> dict[str, str]:
        return {"url": self._url, "host_url": self._url, "hostname": "127.0.0.1", "vhost": "/"}


class LocalWorker(CeleryWorkerContainer):
    """`celery -A tasks worker` as a process."""

    def __init__(self, container: ProcessContainer) -> None:
        super().__init__(container)
        self.process = container.process

    @classmethod
    def version(cls) -> str:
        return str(celery.__version__)

    @property
    def ready_prompt(self) -> str:
        return " ready."

    def teardown(self) -> None:
        self.process.close()


class Worker(CeleryTestWorker):
    """A worker node that knows the name its process was started with."""

    def __init__(self, container: LocalWorker, app: Any, name: str) -> None:
        super().__init__(container, app)
        self._name = name
        self.process = container.process

    @property
    def pid(self) -> int:
        return self.process.pid

    def hostname(self) -> str:
        return self._name
