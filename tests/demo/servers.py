"""The servers of the demo: those the environment names, or embedded ones in the run's directory."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from config.embedded.host import tail
from tests.demo.interrupts import Interrupts
from tests.demo.plan import Places, Plan
from tests.demo.producer import THREADS
from tests.demo.programs import DemoError
from tests.servers import OwnServer, PostgresServer, RedisServer

# Observers, Flower's and a psql; and what a cluster keeps for superusers.
_OTHER_CONNECTIONS = 60


class Servers:
    """Addresses of both servers, and the watch over those that are ours."""

    def __init__(self, plan: Plan, directory: Path, interrupts: Interrupts, stack: ExitStack) -> None:
        self._embedded: dict[Path, OwnServer] = {}

        def start(name: str, kind: Callable[..., OwnServer], **options: Any) -> Any:
            with interrupts.held():
                server = stack.enter_context(kind(directory / name, **options).start())
            self._embedded[directory / name] = server
            return server

        if plan.database_url is None:
            # A producer's thread may need a second connection, to repeat itself at once.
            connections = _OTHER_CONNECTIONS + 2 * plan.workers + 2 * THREADS * plan.producers
            settings = {"max_connections": str(connections)}
            self.database_url: str = start("postgres", PostgresServer, settings=settings).url()
        else:
            self.database_url = plan.database_url
        self.broker_url: str = plan.broker_url or start("redis", RedisServer).url

    def require_running(self) -> None:
        """Raise DemoError if an embedded server died."""
        for directory, server in self._embedded.items():
            if not server.running:
                raise DemoError(f"{server.program} died; the end of its log:\n{tail(directory / 'server.log')}")

    def environment(self, plan: Plan, places: Places) -> dict[str, str]:
        """For the programs."""
        return {
            "TIDEMARK_DATABASE_URL": self.database_url,
            "TIDEMARK_BROKER_URL": self.broker_url,
            "TIDEMARK_DATA_DIR": str(places.directory / "data"),
            "TIDEMARK_SHARDS": str(plan.shards),
            # What a killed program leaves there goes with the run.
            "TMPDIR": str(places.scratch),
            "PYTHONUNBUFFERED": "1",
        }
