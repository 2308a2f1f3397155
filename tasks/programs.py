"""What Tidemark's worker and beat do beside Celery's. Nothing of it is loaded, or changed, before one starts."""

import logging
import os
import socket
import sys
from contextlib import suppress
from traceback import walk_tb
from typing import Any

import celery.apps.beat
import celery.apps.worker
import celery.beat
from celery import signals
from celery.utils.log import get_logger
from celery.utils.text import str_to_list
from celery.worker.consumer import Consumer as CeleryConsumer
from redis import RedisError

from config.heartbeat import BEAT_SILENCE, WORKER_SILENCE, Heartbeat, heartbeat_file, solo_silence
from config.queues import CONTROL, MAINTENANCE, shard_of_queue
from config.redis import RedisAddress, is_redis
from tasks import inspection  # noqa: F401 - a command that the worker answers
from tasks.app import TidemarkApp
from tasks.dispatch import tracing_of
from tasks.hints import Membership
from tasks.leases import ShardLeases

log = get_logger(__name__)

# With more ticks than this in a queue nobody takes them; another one would tell nobody anything new.
_TICKS_WAITING = 100


class Worker(celery.apps.worker.Worker):
    """A worker without `-Q` leases its shards (tasks/leases.py); every worker shows a sign of life."""

    app: TidemarkApp
    heartbeat: Heartbeat
    leases_shards = False

    def on_before_init(self, quiet: bool = False, **options: Any) -> None:  # noqa: FBT001, FBT002 - Celery's
        """Celery's first hook, before the queues are chosen."""
        super().on_before_init(quiet=quiet, **options)
        app = self.app
        tracing_of(app)
        # The command line names the shards' queues by -Q, or by -X with a shard.
        excluded = map(shard_of_queue, str_to_list(options.get("exclude_queues") or ()))
        named = options.get("queues") or any(shard is not None for shard in excluded)
        self.leases_shards = app.redis_url is not None and not named
        app.steps["consumer"].add(ShardLeases)
        for signal in (signals.worker_process_shutdown, signals.worker_shutdown):
            signal.connect(self._close_connections, weak=False)

    def setup_queues(self, include: Any, exclude: Any = None) -> None:
        """The shards' queues come and go with the leases."""
        super().setup_queues(include, exclude)
        if self.leases_shards:
            queues = self.app.amqp.queues
            queues.select([name for name in (CONTROL, MAINTENANCE) if name in queues.consume_from])

    def startup_info(self, artlines: bool = True) -> str:  # noqa: FBT001, FBT002 - Celery's
        """Celery's banner, and which queues will follow."""
        text = str(super().startup_info(artlines))
        if not self.leases_shards:
            return text
        shards = f"and its share of {self.app.settings.shards} shards, materialize.0 and up"
        return f"{text.rstrip()}\n                ({shards}; see: celery -A tasks inspect shards)\n"

    def live(self) -> None:
        settings = self.app.settings
        solo = self.pool_cls.__module__ == "celery.concurrency.solo"
        silence = solo_silence(settings) if solo else WORKER_SILENCE
        self.heartbeat = Heartbeat(heartbeat_file(settings, "worker"), "worker", stale_after=silence)
        self.heartbeat.wait()

    def on_consumer_ready(self, consumer: Any) -> None:
        """Celery's last hook: the worker consumes."""
        super().on_consumer_ready(consumer)
        say_ready(f"{self.hostname} is ready")
        self.heartbeat.set_ready(ready=True)

    def on_close(self) -> None:
        """Celery's hook: the worker stops, and may wait for its last tasks."""
        super().on_close()
        self.heartbeat.set_ready(ready=False)

    def _close_connections(self, **_: Any) -> None:
        if "database" in vars(self.app):
            self.app.database.close()


class Consumer(CeleryConsumer):
    """Shows a sign of life, and survives the loss of Redis where Celery 5.7's does not.

    While a late-acknowledging task runs and Redis goes away, Celery closes a connection that was torn down already and
    dies with `AttributeError: 'NoneType' object has no attribute …`, which ends the worker. Here the consumer starts
    over, as it does after every lost connection. tests/acceptance/test_outages.py tells when this can go.
    """

    def start(self) -> None:
        """Called once, when the pool has forked; goes on until the worker stops."""
        if isinstance(self.controller, Worker):
            self.controller.live()
        while True:
            try:
                super().start()
            except AttributeError as error:
                *_, (frame, _) = walk_tb(error.__traceback__)
                if str(frame.f_globals.get("__name__")).partition(".")[0] not in {"kombu", "redis"}:
                    # Anybody else's AttributeError is a defect, and starting over would only hide it.
                    raise
                log.warning("the connection to the broker was torn down (%s): starting over", error)
                self.on_close()
                self.blueprint.restart(self)
            else:
                return


class Beat(celery.apps.beat.Beat):
    class Service(celery.beat.Service):
        """Beat's service: its scheduler, whichever it is, shows a sign of life and fills no queue without end."""

        def get_scheduler(self, lazy: bool = False, **options: Any) -> Any:  # noqa: FBT001, FBT002 - Celery's
            """Celery's hook; `lazy` for the banner only."""
            scheduler = super().get_scheduler(lazy=lazy, **options)
            if not lazy:
                file = heartbeat_file(self.app.settings, "beat")
                watch(scheduler, self.app, Heartbeat(file, "beat", stale_after=BEAT_SILENCE))
            return scheduler


def say_ready(what: str) -> None:
    """Tell whoever started a program, where its log does not."""
    if not log.isEnabledFor(logging.INFO):
        print(what, file=sys.stderr, flush=True)  # noqa: T201 - below the banner, which Celery prints


def watch(scheduler: Any, app: TidemarkApp, heartbeat: Heartbeat) -> None:
    """Watch a scheduler's ticks and publications; until the first tick is over, it may wait for the broker."""
    membership = app.once(Membership)
    membership.enter(f"beat@{socket.gethostname()}", program="beat", pid=os.getpid())
    broker = RedisAddress.parse(app.broker_url).client(seconds=1) if is_redis(app.broker_url) else None
    tick, publish, route = scheduler.tick, scheduler.apply_async, app.amqp.router.route
    ready = False
    heartbeat.wait()

    def ticking(*arguments: Any, **options: Any) -> Any:
        nonlocal ready
        pause = tick(*arguments, **options)
        if not ready:
            ready = True
            log.info("beat is ready")
            say_ready("beat is ready")
            heartbeat.set_ready(ready=True)
        heartbeat.resume()
        membership.renew()
        return pause

    def publishing(entry: Any, *arguments: Any, **options: Any) -> Any:
        heartbeat.tick()
        # Where the broker does not answer, publishing will say what is wrong.
        with suppress(RedisError):
            if broker is not None and broker.llen(route({}, entry.task)["queue"].name) >= _TICKS_WAITING:
                log.warning("nobody takes the ticks from their queue: not adding one", extra={"scheduled": entry.task})
                return None
        return publish(entry, *arguments, **options)

    scheduler.tick, scheduler.apply_async = ticking, publishing
