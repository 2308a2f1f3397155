"""The embedded servers as tests, demo and benchmarks use them: run by this process, without a keeper, and crashed."""

from typing import Self

from config.embedded import postgres, redis
from config.embedded.server import EmbeddedServer


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


class RedisServer(OwnServer, redis.RedisServer): ...
