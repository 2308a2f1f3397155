"""Celery's configuration, computed from the settings.

Messages are hints (invariant 8): everything here makes losing or doubling them rare and cheap; nothing relies on it.
"""

from typing import Any
from urllib.parse import urlsplit

from kombu import Exchange, Queue
from kombu.utils.scheduling import round_robin_cycle

from config.queues import CONTROL, all_queues, shard_of_queue
from config.redis import RedisAddress, is_redis
from config.settings import Settings

# Seconds that a publication, or anything else outside a worker's own loop, may wait for the broker. A worker waits
# longer: its loop has nothing else to do, and starting over costs it its place in every queue.
_PUBLISH_SECONDS = 2.0
_CONSUME_SECONDS = 30.0
_STALE_SECONDS = 30.0
_PAUSES = {"interval_start": 0.0, "interval_step": 0.2}

# Transport options of connections that publish and ask, over those in the configuration.
PUBLISH_OPTIONS = {
    "socket_connect_timeout": _PUBLISH_SECONDS,
    "socket_timeout": _PUBLISH_SECONDS,
    # Without a limit Kombu tries to connect for ever.
    "max_retries": 1,
    **_PAUSES,
    "connect_retries_timeout": _PUBLISH_SECONDS,
}


class ControlFirst(round_robin_cycle):  # type: ignore[misc]  # kombu is untyped
    """The order in which a worker asks Redis for its queues: the control queue, then the others in turn.

    After a message from the control queue the others come first, once. Otherwise a worker would serve nothing else
    where ticks come faster than it serves them.
    """

    def consume(self, n: int) -> list[str]:
        queues: list[str] = super().consume(n)
        # Kombu puts the queue whose message it took last at the end.
        return queues if queues[-1:] == [CONTROL] else sorted(queues, key=lambda queue: queue != CONTROL)


def celery_config(settings: Settings, broker_url: str, redis_url: str | None) -> dict[str, Any]:
    """All of Celery's settings that differ from its defaults."""
    tasks = Exchange("tidemark", type="direct", durable=True)
    # RabbitMQ: one consumer at a time, the next one takes over. Redis ignores it.
    one_consumer = {"x-single-active-consumer": True}
    broker = RedisAddress.parse(broker_url) if is_redis(broker_url) else None
    intervals = {
        "fan_out": settings.fan_out_interval,
        "sweep": settings.sweep_interval,
        "retain": settings.retention_interval,
        "purge": settings.retention_interval,
        "audit": settings.audit_interval,
    }
    if settings.object_store is not None:
        intervals |= {"collect": settings.collect_interval, "reconcile": settings.reconcile_interval}
    config: dict[str, Any] = {
        "broker_url": broker_url if broker is None else broker.celery_url,
        "task_queues": [
            Queue(name, tasks, routing_key=name, queue_arguments=None if shard_of_queue(name) is None else one_consumer)
            for name in all_queues(settings.shards)
        ],
        "task_default_queue": CONTROL,
        "task_default_exchange": tasks.name,
        "task_default_routing_key": CONTROL,
        # A misspelt queue is an error, not a queue nobody reads.
        "task_create_missing_queues": False,
        # A task that dies with its worker is delivered again, and every task bears being run again.
        "task_acks_late": True,
        "task_reject_on_worker_lost": True,
        # One task at a time: what waits in a worker cannot be taken over by another.
        "worker_prefetch_multiplier": 1,
        # More processes rather than more slots: one consumer with one slot is what serializes a shard.
        "worker_concurrency": 1,
        "task_time_limit": settings.hard_time_limit,
        # The ad-hoc jobs keep theirs; who waits for another one asks for it when publishing.
        "task_ignore_result": True,
        # Without a Redis there are no results, and with this None beat publishes no task of Celery's to clean them up.
        "result_expires": 3600 if redis_url is not None else None,
        "result_extended": True,
        "timezone": "UTC",
        "broker_connection_retry_on_startup": True,
        # Celery's default gives up after 100 tries and ends the worker.
        "broker_connection_max_retries": None,
        # With 5.7's defaults a lost connection cancels late-acknowledging tasks half done; they are safe to finish.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_soft_shutdown_timeout": min(10.0, settings.task_seconds),
        # No persistence: all entries are intervals, and running one early is harmless.
        "beat_scheduler": "celery.beat:Scheduler",
        "beat_max_loop_interval": min(5.0, settings.fan_out_interval),
        "beat_schedule": {
            name: {
                "task": f"tasks.{name}",
                "schedule": interval,
                # RabbitMQ drops a tick nobody took; on Redis beat publishes none into a long queue (tasks/programs.py).
                # Celery's own `expires` compares two machines' clocks: half a minute apart, they drop every tick.
                "options": {"expiration": max(interval, _STALE_SECONDS)},
            }
            for name, interval in intervals.items()
        },
        # For `beat -S redbeat.RedBeatScheduler`: one of several beats runs. Its lock outlives it by seconds only. Its
        # URL is not here, where `inspect conf` and Flower would show the password: see `TidemarkApp.redbeat_conf`.
        "redbeat_lock_timeout": 10,
        "redbeat_key_prefix": "tidemark:beat:",
        # Who publishes learns soon that the broker is away; the next tick or sweep finds what was not published.
        "task_publish_retry_policy": {"max_retries": 1, **_PAUSES},
    }
    if urlsplit(broker_url).scheme == "amqps":
        # Kombu puts the broker's name there. Otherwise any host's certificate would do.
        config["broker_use_ssl"] = {"server_hostname": None}
    if broker is not None:
        config["broker_transport_options"] = {
            **broker.celery_options,
            "visibility_timeout": settings.visibility_timeout,
            # Look for tasks of dead workers often: the defaults stretch the visibility timeout ninefold.
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            # No priorities: a quarter of the keys in every BRPOP.
            "priority_steps": [0],
            # A worker with one slot takes a fan-out next, or after one other task, whatever else waits.
            "queue_order_strategy": f"{ControlFirst.__module__}:{ControlFirst.__qualname__}",
            # Without them a publish on a dead connection hangs for ever.
            "socket_connect_timeout": 5,
            "socket_timeout": _CONSUME_SECONDS,
            # Kombu hands it to Unix sockets as well, which know no such thing.
            **({} if broker.path else {"socket_keepalive": True}),
        }
    if redis_url is not None:
        results = RedisAddress.parse(redis_url)
        config |= {
            "result_backend": results.celery_url,
            "result_backend_transport_options": {
                **results.celery_options,
                # Celery's default tries for 20 s, and then asks for a restart.
                "retry_policy": {"max_retries": 2, **_PAUSES},
            },
            "redis_socket_connect_timeout": _PUBLISH_SECONDS,
            "redis_socket_timeout": _PUBLISH_SECONDS,
            "redis_socket_keepalive": not results.path,
            "redis_backend_health_check_interval": 30,
        }
    return config
