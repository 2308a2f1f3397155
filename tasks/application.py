"""The Celery app: Celery, plus the settings and the connections its tasks work with.

Nothing is read or opened when this is imported. The settings are read at first use, embedded servers start when an
address is first needed, and connections open in the process that uses them.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import click
from celery import Celery
from redis import Redis

from config.celery import celery_config, is_redis
from config.embedded import Lease, attach
from config.errors import TidemarkError
from config.settings import Settings, load_settings
from db.migrate import bring_up
from db.pool import Database
from tasks.names import PartitionNames
from tasks.queued import QueuedTokens
from tasks.routing import Router


class TidemarkApp(Celery):
    """`celery -A tasks` finds its one instance as `tasks.app`."""

    @cached_property
    def settings(self) -> Settings:
        return load_settings()

    @cached_property
    def _embedded(self) -> Lease:
        # Held until the process ends: the servers stop after the last process that uses them.
        lease = attach(self.settings.data_dir)
        bring_up(lease.endpoints.database_url)
        return lease

    @property
    def database_url(self) -> str:
        return self.settings.database_url or self._embedded.endpoints.database_url

    @property
    def broker_url(self) -> str:
        return self.settings.broker_url or self._embedded.endpoints.broker_url

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

    @cached_property
    def redis(self) -> "Redis | None":
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
        )

    @cached_property
    def queued(self) -> QueuedTokens:
        return QueuedTokens(self.redis, seconds=self.settings.queued_seconds)

    @cached_property
    def names(self) -> PartitionNames:
        return PartitionNames()

    def prepare_config(self, c: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """Celery's hook for a configuration computed late."""
        try:
            ours = celery_config(self.settings, self.broker_url, self.redis_url)
            ours["task_routes"] = (Router(self.settings.shards),)
        except TidemarkError as error:
            if click.get_current_context(silent=True) is not None:
                # A mistake of the user's on the command line: a message, no traceback.
                raise click.ClickException(str(error)) from error
            raise
        prepared: Mapping[str, Any] = super().prepare_config({**(c or {}), **ours})
        return prepared
