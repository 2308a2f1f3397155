"""The Celery app: Celery, plus the settings and the connections its tasks work with.

Nothing is read, opened or changed when this is imported. The settings are read at first use, embedded servers start
when an address is first needed, and connections open in the process that uses them.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from celery import Celery

from config.errors import TidemarkError
from config.queues import route
from config.redis import RedisAddress, is_redis

if TYPE_CHECKING:
    from redbeat.schedulers import RedBeatConfig
    from redis import Redis

    from config.embedded.keeper import Lease
    from config.settings import Settings
    from db.pool import Database

_Part = TypeVar("_Part")

# Redis answers within a millisecond; one that needs longer than this hangs.
ANSWER_SECONDS = 0.5


class TidemarkApp(Celery):
    """`celery -A tasks` finds its one instance as `tasks.app`."""

    # Celery loads all of these by name, when a program needs them and not before.
    log_cls = "tasks.logs:Logging"
    consumer_cls = "tasks.programs:Consumer"

    def __init__(self, name: str, **options: Any) -> None:
        self._parts: dict[Callable[..., Any], Any] = {}
        # Not the current app of a program that merely imports us.
        super().__init__(name, set_as_current=False, include=["tasks.jobs"], **options)

    def once(self, kind: "Callable[[TidemarkApp], _Part]") -> _Part:
        """This app's one `kind`, made of the app at the first call."""
        if kind not in self._parts:
            self._parts[kind] = kind(self)
        return cast("_Part", self._parts[kind])

    @cached_property
    def Worker(self) -> Any:  # noqa: N802 - Celery's name
        return self.subclass_with_self("tasks.programs:Worker")

    @cached_property
    def Beat(self) -> Any:  # noqa: N802 - Celery's name
        return self.subclass_with_self("tasks.programs:Beat")

    @cached_property
    def settings(self) -> "Settings":
        from config.settings import load_settings  # noqa: PLC0415 - `--help` does without

        return load_settings()

    # Both are held until the process ends: an embedded server stops after the last process that uses it.
    @cached_property
    def embedded_postgres(self) -> "Lease":
        from config.embedded.keeper import attach  # noqa: PLC0415 - most installations have servers of their own
        from db.migrate import bring_up  # noqa: PLC0415 - Alembic would cost every program half a second

        lease = attach(self.settings.data_dir, "postgres")
        bring_up(lease.url)
        return lease

    @cached_property
    def embedded_redis(self) -> "Lease":
        from config.embedded.keeper import attach  # noqa: PLC0415 - as above

        return attach(self.settings.data_dir, "redis")

    @property
    def database_url(self) -> str:
        return self.settings.database_url or self.embedded_postgres.url

    @property
    def broker_url(self) -> str:
        return self.settings.broker_url or self.embedded_redis.url

    @property
    def redis_url(self) -> str | None:
        """Redis for results and hints; None with another broker and no `TIDEMARK_REDIS_URL`."""
        if self.settings.redis_url is not None:
            return self.settings.redis_url
        return self.broker_url if is_redis(self.broker_url) else None

    @cached_property
    def database(self) -> "Database":
        from db.pool import Database  # noqa: PLC0415 - commands have a connection of their own

        # A process of a prefork or solo pool runs one task at a time. With threads the pool grows to what they use.
        return Database(self.database_url, self.settings, threads=1)

    @cached_property
    def redis(self) -> "Redis | None":
        """A client of it. What may as well go without an answer asks by `tasks.hints`."""
        return None if self.redis_url is None else RedisAddress.parse(self.redis_url).client(seconds=ANSWER_SECONDS)

    @cached_property
    def redbeat_conf(self) -> "RedBeatConfig":
        """RedBeat looks here first. In Celery's configuration its URL would show the password to `inspect conf`."""
        from redbeat.schedulers import RedBeatConfig  # noqa: PLC0415 - only where beat runs with it

        conf = RedBeatConfig(self)
        if self.redis_url is not None:
            conf.redis_url = self.redis_url
        return conf

    def connection_for_write(self, url: str | None = None, heartbeat: float | None = None, **options: Any) -> Any:
        """As Celery's; who publishes or asks gives up after seconds, where a worker's own loop waits longer."""
        if is_redis(self.broker_url):
            from config.celery import PUBLISH_OPTIONS  # noqa: PLC0415 - `--help` does without

            options["transport_options"] = {**PUBLISH_OPTIONS, **(options.get("transport_options") or {})}
        return self._connection(url or self.conf.broker_write_url, heartbeat=heartbeat, **options)

    def prepare_config(self, c: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Celery's hook for a configuration computed late."""
        try:
            from config.celery import celery_config  # noqa: PLC0415 - `--help` does without

            ours = celery_config(self.settings, self.broker_url, self.redis_url)
            # An embedded Postgres is held by this process, rather than by those of its pool, which come and go.
            _ = self.database_url
        except TidemarkError as error:
            if click.get_current_context(silent=True) is not None:
                # A mistake of the user's on the command line: a message, no traceback.
                raise click.ClickException(str(error)) from error
            raise
        ours |= {"task_routes": (partial(route, self.settings.shards),), "worker_consumer": self.consumer_cls}
        prepared: Mapping[str, Any] = super().prepare_config({**(c or {}), **ours})
        return prepared


app = TidemarkApp("tidemark")
