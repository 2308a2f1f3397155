"""Which messages a worker takes: those that Tidemark, `celery call` and Flower publish.

Whoever reaches the broker can put anything into a queue. Celery refuses what is not JSON, but it trusts the rest: a
message with an id that is a list, or a body of another shape, ends the worker, is restored, and ends the next one. So
each message is looked at before Celery does. What is refused is gone; the truth is in Postgres (invariant 8).
"""

import inspect
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, get_origin

from celery.exceptions import NotRegistered
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import compression
from kombu.exceptions import ContentDisallowed

from config.errors import InvalidJobError, InvalidMessageError
from config.queues import MATERIALIZE, partition_ids_of
from tasks.app import TidemarkApp

# A task with the most partitions that `TIDEMARK_PARTITIONS_PER_TASK` allows has 110 kB.
LONGEST_BODY = 1_000_000
_LONGEST_HEADER = 4_000
# Celery's own tasks, such as `celery.map`, run others behind the back of these checks.
_OURS = "tasks."
_SHOWN = 100


def vet(app: TidemarkApp, message: Any) -> None:
    """Raises what `reason_of` knows for a message that no program of ours would publish; drops its time limits."""
    headers = message.headers
    if len(message.body or "") > LONGEST_BODY:
        raise InvalidMessageError("size", f"its body has {len(message.body):,} bytes, more than {LONGEST_BODY:,}")
    # The worker's settings limit a task's time; Celery publishes those of whoever asks.
    headers["timelimit"] = None
    for name, value in headers.items():
        _require_known(name, value)
    task_id, name = headers.get("id"), headers.get("task")
    if not isinstance(task_id, str) or not task_id or not isinstance(name, str):
        raise InvalidMessageError("headers", "it has no id or no task: Celery's message protocol 2 has both")
    task = app.tasks[name] if name.startswith(_OURS) and name in app.tasks else None
    if task is None:
        raise NotRegistered(name[:_SHOWN])
    retries, eta = headers.get("retries") or 0, headers.get("eta")
    if type(retries) is not int or not 0 <= retries <= (task.max_retries or 0):
        raise InvalidMessageError("headers", f"its retries are not 0 to {task.max_retries}")
    if not isinstance(headers.get("expires"), str | None):
        raise InvalidMessageError("headers", "its expires is no time")
    _require_soon(eta, app.settings.visibility_timeout)
    args, kwargs = _arguments_of(message)
    _require_arguments(task, args, kwargs)


def reason_of(error: BaseException) -> str:
    """The label under which a refused message is counted; one of a fixed set."""
    if isinstance(error, InvalidMessageError):
        return error.reason
    if isinstance(error, NotRegistered):
        return "task"
    if isinstance(error, InvalidJobError):
        return "arguments"
    return "content" if isinstance(error, ContentDisallowed) else "body"


def refuse_compression() -> None:
    """Nothing of ours is compressed, and a kilobyte may unfold to a gigabyte before anybody has looked at it."""

    def refused(_: Any) -> Any:
        raise InvalidMessageError("content", "it is compressed")

    for method in compression.encoders():
        compression.register(compression.get_encoder(method)[0], refused, method)


def _require_known(name: str, value: Any) -> None:
    if name in {"stamps", "stamped_headers"}:
        known = not value
    else:
        # `x-…` are RabbitMQ's own.
        known = value is None or isinstance(value, str | int | float) or name.startswith("x-")
    if not known:
        raise InvalidMessageError("headers", f"nobody of ours sets its header {name[:_SHOWN]!r} like that")
    if isinstance(value, str) and len(value) > _LONGEST_HEADER:
        raise InvalidMessageError("headers", f"its header {name[:_SHOWN]!r} has {len(value):,} characters")


def _require_soon(eta: Any, seconds: float) -> None:
    if eta is None:
        return
    try:
        due = maybe_make_aware(maybe_iso8601(eta), UTC)
        soon = due - datetime.now(UTC) <= timedelta(seconds=seconds)
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise InvalidMessageError("headers", "its eta is no time") from None
    if not soon:
        raise InvalidMessageError(
            "headers", f"it is due in more than {seconds:g} s (TIDEMARK_VISIBILITY_TIMEOUT): no worker holds it so long"
        )


def _arguments_of(message: Any) -> tuple[list[Any], dict[str, Any]]:
    body = message.payload
    if not isinstance(body, list | tuple) or [type(part) for part in body] != [list, dict, dict]:
        raise InvalidMessageError("body", "it is not [arguments, keyword arguments, what follows]")
    args, kwargs, follows = body
    if any(follows.values()):
        # Each of them publishes tasks, of any name, to any queue, when this one has ended.
        raise InvalidMessageError("workflow", "it has a callback, a chain or a chord; call one task after the other")
    return args, kwargs


def _require_arguments(task: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Raise InvalidJobError unless they are what the task declares."""
    signature = inspect.signature(task.run)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise InvalidJobError(f"{task.name}: {str(error)[:_SHOWN]}") from None
    if task.name == MATERIALIZE:
        partition_ids_of(None, given)
    for name, value in given.items():
        kind = signature.parameters[name].annotation
        if not _fits(value, kind):
            raise InvalidJobError(f"{task.name}: {name} is no {inspect.formatannotation(kind)}")


def _fits(value: Any, annotation: Any) -> bool:
    if get_origin(annotation) is list:
        (kind,) = annotation.__args__
        return isinstance(value, list) and all(type(item) is kind for item in value)
    # Not bool, which is an int.
    return type(value) is annotation


def describe(headers: Mapping[str, Any]) -> dict[str, str]:
    """Which message it was, as far as it says so: fields for the log."""
    found = {"for_task": headers.get("task"), "message_id": headers.get("id")}
    return {name: value[:_SHOWN] for name, value in found.items() if isinstance(value, str)}
