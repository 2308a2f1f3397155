"""What Tidemark's worker and beat do beside Celery's. Nothing of it is loaded, or changed, before one starts."""

import logging
import os
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import wraps
from traceback import walk_tb
from typing import Any

import celery.apps.beat
import celery.apps.worker
import celery.beat
from celery import signals
from celery.exceptions import NotRegistered
from celery.utils.log import get_logger
from celery.utils.text import str_to_list
from celery.worker.consumer import Consumer as CeleryConsumer
from kombu.exceptions import KombuError
from redis import RedisError

from config.errors import InvalidJobError, InvalidMessageError, TidemarkError
from config.heartbeat import BEAT_SILENCE, WORKER_SILENCE, Heartbeat, heartbeat_file, solo_silence
from config.queues import CONTROL, MAINTENANCE, shard_of_queue
from config.redis import RedisAddress, is_redis
from tasks import inspection  # noqa: F401 - a command that the worker answers
from tasks.app import TidemarkApp
from tasks.dispatch import tracing_of
from tasks.hints import Background, Membership
from tasks.leases import ShardLeases
from tasks.messages import describe, reason_of, refuse_compression, vet
from tasks.metrics import WorkerMetrics

log = get_logger(__name__)

# With more ticks than this in a queue nobody takes them; another one would tell nobody anything new.
_TICKS_WAITING = 100
# Of what is wrong with a message so much is logged.
_FAULT = 200


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
        refuse_compression()
        if is_redis(app.broker_url):
            survive_envelopes(app)
        for signal in (signals.worker_process_shutdown, signals.worker_shutdown):
            signal.connect(self._close_connections, weak=False)

    def prepare_args(self, **options: Any) -> Any:
        """Celery's hook. Nothing of ours needs its gossip, and there an event of a stranger's would end the worker."""
        return {**options, "without_gossip": True}

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
    """Shows a sign of life, takes no message of strangers', and survives the loss of Redis where Celery 5.7's does not.

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

    def create_task_handler(self, *arguments: Any) -> Any:
        """Celery's, behind a look at the message."""
        handle = super().create_task_handler(*arguments)

        def look(message: Any) -> None:
            try:
                vet(self.app, message)
                handle(message)
            except (ConnectionError, *self.connection_errors) as error:
                # Kombu counts KeyError among them.
                if not isinstance(error, LookupError):
                    raise
                self._refuse(message, error)
            except Exception as error:  # noqa: BLE001 - or it would end this worker, and then the next one
                self._refuse(message, error)

        return look

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Of any message, also of remote control's: it cannot be decoded."""
        refused(self.app, exc, message.headers)
        message.ack_log_error(log, self.connection_errors)

    def on_invalid_task(self, body: Any, message: Any, exc: Exception) -> None:  # noqa: ARG002 - Celery's
        """What Celery finds that `vet` did not, such as an `expires` that is no time."""
        self._refuse(message, InvalidMessageError("headers", str(exc)))

    def _refuse(self, message: Any, error: Exception) -> None:
        refused(self.app, error, message.headers)
        message.reject_log_error(log, self.connection_errors)
        if message.headers.get("ignore_result") is False and isinstance(error, InvalidJobError | NotRegistered):
            # Somebody's own mistake, perhaps, who waits for the result.
            self.app.backend.mark_as_failure(message.headers["id"], error)


def refused(app: TidemarkApp, error: Exception, headers: Mapping[str, Any]) -> None:
    """Log and count a message that is not taken."""
    reason = reason_of(error)
    fault = str(error) if isinstance(error, TidemarkError) else f"{type(error).__name__}: {error}"
    fields = {"reason": reason, "error": fault[:_FAULT], **describe(headers)}
    # What nobody raises on purpose may be a defect of ours: then the log tells where.
    known = isinstance(error, TidemarkError | KombuError | NotRegistered)
    log.warning("a message was refused", extra=fields, exc_info=None if known else error)
    metrics = app.once(WorkerMetrics)
    metrics.add("messages_refused", reason)
    app.once(Background).submit(metrics.flush)


def survive_envelopes(app: TidemarkApp) -> None:
    """Let a worker on Redis go on after an item that is no message of Kombu's, whose errors would end it."""
    from celery.worker.pidbox import Pidbox  # noqa: PLC0415 - workers on Redis only
    from kombu.transport.redis import Channel  # noqa: PLC0415 - workers on Redis only

    def guarded(read: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(read)
        def reading(channel: Any, *arguments: Any, **options: Any) -> Any:
            try:
                return read(channel, *arguments, **options)
            except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
                *_, (frame, _) = walk_tb(error.__traceback__)
                if isinstance(error, AttributeError) and frame.f_globals.get("__name__") != "kombu.message":
                    # A connection that was torn down: see `Consumer`.
                    raise
                refused(app, InvalidMessageError("envelope", f"{type(error).__name__}: {error}"), {})
                return True

        return reading

    Channel._brpop_read = guarded(Channel._brpop_read)  # noqa: SLF001 - Kombu has no hook there
    Channel._receive_one = guarded(Channel._receive_one)  # noqa: SLF001
    # Celery opens remote control's channel again after a command that is none, and then hears no other one. There is no
    # need to: an error does not close a channel on Redis.
    Pidbox.reset = _stay


def _stay(_pidbox: Any) -> None:
    """In place of a reset."""


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
