"""OpenTelemetry: a commit, what queued it and what materialized it as one trace.

Imported only where `TIDEMARK_TRACING` is set; without it nothing of OpenTelemetry is loaded.

How a trace gets from a commit to its materialization:

- `dispatch.committing(app, key, partition_ids)` around a commit makes its span. What is published inside it (a
  wake-up) carries the span's context in Celery's message headers, and the materialization becomes its child.
- Fan-out finds commits in Postgres, which knows nothing of traces. So on leaving, `committing` notes its context in
  Redis for each partition that was not published, and whoever publishes a partition takes what is noted for it: the
  oldest commit is the parent, the others (and fan-out's own span) are links.

Not linkable: commits by brokers that speak SQL, which have no span here; a commit whose partition fan-out published
between the commit and the note; and everything without Redis. Their materialization is a child of fan-out's span.

Fan-out and sweep leave a span when they published something or failed, the other periodic tasks when they failed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, Token
from importlib.metadata import entry_points
from os import environ
from typing import Any

from celery import signals
from opentelemetry import context as contexts
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, StatusCode
from redis import Redis

from config.errors import SettingsError
from config.queues import MATERIALIZE, partition_ids_of
from tasks.app import TidemarkApp
from tasks.hints import Background, Hints

log = logging.getLogger(__name__)

_FINDERS = {"tasks.fan_out", "tasks.sweep"}
_PERIODIC = _FINDERS | {f"tasks.{name}" for name in ("retain", "purge", "audit", "collect", "reconcile")}
_LINKS = 32
# As long as a commit may wait for its materialization and still be shown with it.
_NOTED_SECONDS = 600
# What a materialization's span says of its result.
_RESULT = ("events_processed", "records", "partitions_processed", "lock_wait_time_ms", "errors", "strategy")

# Partitions of the commit at hand that nobody has published yet.
_unannounced: ContextVar[set[int] | None] = ContextVar("unannounced", default=None)


_key = "tidemark:trace:{}".format


def _put(redis: Redis, partition_ids: set[int], traceparent: str) -> bool:
    with redis.pipeline(transaction=False) as pipeline:
        for key in map(_key, partition_ids):
            pipeline.rpush(key, traceparent)
            pipeline.ltrim(key, 0, _LINKS)
            pipeline.expire(key, _NOTED_SECONDS)
        return bool(pipeline.execute())


def _pop(redis: Redis, partition_ids: Sequence[int]) -> list[str]:
    with redis.pipeline(transaction=False) as pipeline:
        for key in map(_key, partition_ids):
            pipeline.lrange(key, 0, -1)
            pipeline.delete(key)
        return [value for values in pipeline.execute()[::2] for value in values]


def make_provider() -> TracerProvider:
    """The program's provider, if it has set one up; else one that exports where `OTEL_TRACES_EXPORTER` says."""
    existing = trace.get_tracer_provider()
    if isinstance(existing, TracerProvider):
        return existing
    name = environ.get("OTEL_TRACES_EXPORTER", "otlp")
    # Both may be named so; the second is what the first stands for.
    found = {e.name: e for e in entry_points(group="opentelemetry_traces_exporter")}
    entry = found.get(name) or found.get(f"{name}_proto_grpc") or found.get(f"{name}_proto_http")
    if entry is None:
        raise SettingsError(
            f"TIDEMARK_TRACING: there is no exporter {name!r} (OTEL_TRACES_EXPORTER). Install "
            f"opentelemetry-exporter-{name}, or use one of: {', '.join(sorted(found)) or 'none is installed'}"
        )
    provider = TracerProvider(resource=Resource.create({"service.name": environ.get("OTEL_SERVICE_NAME", "tidemark")}))
    provider.add_span_processor(BatchSpanProcessor(entry.load()()))
    trace.set_tracer_provider(provider)
    return provider


class Tracing:
    """Makes the spans of one app's tasks."""

    def __init__(self, app: TidemarkApp, provider: TracerProvider | None = None) -> None:
        self._app = app
        self._hints = app.once(Hints)
        self._provider = provider or make_provider()
        self._tracer = self._provider.get_tracer("tidemark")
        self._running: dict[str, tuple[Span, Token[Context]]] = {}
        signals.before_task_publish.connect(self._before_publish, weak=False)
        signals.task_prerun.connect(self._before_task, weak=False)
        signals.task_postrun.connect(self._after_task, weak=False)
        # The children of a prefork pool end without Python's own farewell.
        signals.worker_process_shutdown.connect(self._flush, weak=False)

    @contextmanager
    def committing(self, object_key: str, partition_ids: Sequence[int]) -> Iterator[None]:
        """The span of a commit, and of what is published inside."""
        ids = set(partition_ids)
        attributes: dict[str, str | int] = {"tidemark.object_key": object_key, "tidemark.partitions": len(ids)}
        with self._tracer.start_as_current_span("commit", attributes=attributes) as span:
            token = _unannounced.set(ids)
            try:
                yield
            finally:
                _unannounced.reset(token)
        if span.get_span_context().trace_flags.sampled:
            # After the wake-up, which the same thread publishes; what that announces needs no note.
            self._app.once(Background).submit(self._note, ids, span)

    def _note(self, partition_ids: set[int], span: Span) -> None:
        carrier: dict[str, str] = {}
        propagate.inject(carrier, trace.set_span_in_context(span, Context()))
        parent = carrier.get("traceparent")
        if partition_ids and parent and not self._hints.ask(lambda r: _put(r, partition_ids, parent), otherwise=False):
            log.warning("a commit's trace ends with it: Redis does not answer")

    def _take(self, partition_ids: Sequence[int]) -> list[SpanContext]:
        """What is noted for partitions, each once."""
        noted: list[str] = self._hints.ask(lambda redis: _pop(redis, partition_ids), [])
        spans = (
            trace.get_current_span(propagate.extract({"traceparent": value}, Context())).get_span_context()
            for value in dict.fromkeys(noted)
        )
        return [span for span in spans if span.is_valid][: _LINKS + 1]

    # --- Signals

    def _before_publish(self, sender: Any, headers: dict[str, Any], body: Any, **_: Any) -> None:
        current = trace.get_current_span()
        if sender != MATERIALIZE:
            if sender.startswith("tasks.") and current.get_span_context().is_valid:
                propagate.inject(headers)
            return
        # Signals swallow what receivers raise; the arguments were looked at by the router.
        partition_ids = partition_ids_of(*body[:2])
        if (unannounced := _unannounced.get()) is not None:
            unannounced.difference_update(partition_ids)
        noted = self._take(partition_ids)
        parent = contexts.get_current()
        if noted and getattr(current, "name", None) in {*_FINDERS, None}:
            # Found in Postgres: the trace is the commit's, and fan-out a link.
            parent = trace.set_span_in_context(trace.NonRecordingSpan(noted.pop(0)))
            if current.get_span_context().is_valid:
                noted.append(current.get_span_context())
        span = self._tracer.start_span(
            f"publish {MATERIALIZE}",
            context=parent,
            kind=SpanKind.PRODUCER,
            links=[Link(other) for other in noted],
            attributes={"messaging.system": "celery", "tidemark.partitions": len(partition_ids)},
        )
        propagate.inject(headers, trace.set_span_in_context(span))
        span.end()

    def _before_task(self, task_id: str, task: Any, **_: Any) -> None:
        if task.app is not self._app or not task.name.startswith("tasks."):
            return
        carrier = {name: value for name in ("traceparent", "tracestate") if (value := task.request.get(name))}
        span = self._tracer.start_span(
            task.name,
            context=propagate.extract(carrier, Context()),
            kind=SpanKind.CONSUMER,
            attributes={"messaging.system": "celery", "celery.task_id": task_id},
        )
        self._running[task_id] = span, contexts.attach(trace.set_span_in_context(span))

    def _after_task(self, task_id: str, task: Any, retval: Any = None, state: str | None = None, **_: Any) -> None:
        span, token = self._running.pop(task_id, (None, None))
        if span is None or token is None:
            return
        contexts.detach(token)
        result = retval if isinstance(retval, Mapping) else {}
        if state == "FAILURE":
            span.set_status(StatusCode.ERROR, str(retval))
            if isinstance(retval, BaseException):
                span.record_exception(retval)
        elif task.name in _PERIODIC and not (task.name in _FINDERS and result.get("tasks")):
            # Two fan-outs a second that found nothing: a span that does not end is not exported.
            return
        if task.name == MATERIALIZE:
            span.set_attributes({f"tidemark.{name}": result[name] for name in _RESULT if name in result})
        span.end()

    def _flush(self, **_: Any) -> None:
        self._provider.force_flush()
