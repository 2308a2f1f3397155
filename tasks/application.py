"""The Celery app: Celery, plus the settings and the connections its tasks work with.

Nothing is read or opened when this is imported. The settings are read at first use, embedded servers start when an
address is first needed, and connections open in the process that uses them.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click
from celery import Celery
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from config.celery import celery_config, is_redis
from config.embedded import Lease, attach
from config.errors import SettingsError, TidemarkError
from config.settings import Settings, load_settings
from config.strategy import Strategy
from db.pool import Database
from tasks.batching import Controller, make_controllers
from tasks.figures import WorkerFigures
from tasks.names import PartitionNames
from tasks.queued import QueuedTokens
from tasks.routing import Router
from tasks.wake import Waker

if TYPE_CHECKING:
    from tasks.tracing import Tracing


class TidemarkApp(Celery):
    """`celery -A tasks` finds its one instance as `tasks.app`."""

    @cached_property
    def settings(self) -> Settings:
        return load_settings()

    # Both held until the process ends: an embedded server stops after the last process that uses it.
    @cached_property
    def embedded_postgres(self) -> Lease:
        from db.migrate import bring_up  # noqa: PLC0415 - Alembic would cost every program half a second

        lease = attach(self.settings.data_dir, "postgres")
        bring_up(lease.url)
        return lease

    @cached_property
    def embedded_redis(self) -> Lease:
        return attach(self.settings.data_dir, "redis")

    @property
    def database_url(self) -> str:
        return self.settings.database_url or self.embedded_postgres.url

    @property
    def broker_url(self) -> str:
        return self.settings.broker_url or self.embedded_redis.url

    @property
    def redis_url(self) -> str | None:
        """Redis for results and tokens; None with another broker and no `TIDEMARK_REDIS_URL`."""
        if self.settings.redis_url is not None:
            return self.settings.redis_url
        return self.broker_url if is_redis(self.broker_url) else None

    @cached_property
    def database(self) -> Database:
        # A process of a prefork or solo pool runs one task at a time. With threads the pool grows to what they use.
        return Database(self.database_url, self.settings, threads=1)

    # Whether the worker in this process leases its shards: tasks/leases.py decides when one starts.
    leases_shards = False

    @cached_property
    def redis(self) -> "Redis | None":
        return self._connect_redis()

    @cached_property
    def lease_redis(self) -> "Redis | None":
        """Of its own: it is used by a thread, before the pool forks."""
        return self._connect_redis()

    def _connect_redis(self) -> "Redis | None":
        url = self.redis_url
        if url is None:
            return None
        url = url.replace("redis+socket://", "unix://", 1)
        return Redis.from_url(
            url,
            decode_responses=True,
            socket_connect_timeout=5,
            socket_timeout=5,
            socket_keepalive=True,
            health_check_interval=30,
            # All of it is hints: once more, for a connection that went stale, in place of seconds of pauses.
            retry=Retry(NoBackoff(), 1),
        )

    @cached_property
    def queued(self) -> QueuedTokens:
        return QueuedTokens(self.redis, seconds=self.settings.queued_seconds)

    @cached_property
    def figures(self) -> WorkerFigures:
        return WorkerFigures(lambda: self.redis, topics=self.settings.metrics_topics)

    @cached_property
    def controllers(self) -> Mapping[Strategy, Controller]:
        """How much this process takes in one transaction."""
        return make_controllers(self.settings)

    @cached_property
    def waker(self) -> Waker:
        return Waker(self)

    @cached_property
    def names(self) -> PartitionNames:
        return PartitionNames()

    @cached_property
    def tracing(self) -> "Tracing | None":
        """None, and OpenTelemetry not even loaded, unless it is asked for."""
        if not self.settings.tracing:
            return None
        try:
            from tasks.tracing import Tracing  # noqa: PLC0415 - an extra
        except ModuleNotFoundError as error:
            raise SettingsError(
                f"TIDEMARK_TRACING needs {error.name}; install: pip install '.[tracing]' in the checkout"
            ) from None
        return Tracing(self)

    def committing(self, object_key: str, partition_ids: Sequence[int]) -> AbstractContextManager[None]:
        """Put it around a commit from Python, and its wake-up: the span its materialization is shown under."""
        return nullcontext() if self.tracing is None else self.tracing.committing(object_key, partition_ids)

    def prepare_config(self, c: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Celery's hook for a configuration computed late."""
        try:
            ours = celery_config(self.settings, self.broker_url, self.redis_url)
            # An embedded Postgres is held by this process, rather than by those of its pool, which come and go.
            _ = self.database_url
            ours["task_routes"] = (Router(self.settings.shards),)
            # Whoever publishes or runs tasks comes by here.
            _ = self.tracing
        except TidemarkError as error:
            if click.get_current_context(silent=True) is not None:
                # A mistake of the user's on the command line: a message, no traceback.
                raise click.ClickException(str(error)) from error
            raise
        prepared: Mapping[str, Any] = super().prepare_config({**(c or {}), **ours})
        return prepared
