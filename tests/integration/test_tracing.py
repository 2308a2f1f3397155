"""Tracing: commit, publication and materialization are one trace; without it nothing of OpenTelemetry is loaded."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from celery import signals
from celery.contrib.testing.worker import start_worker
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanContext, SpanKind, StatusCode
from psycopg import Connection
from psycopg.rows import TupleRow

from config.errors import SettingsError
from config.queues import all_queues
from db.commit import commit_object
from tasks.app import TidemarkApp
from tasks.dispatch import committing
from tasks.dispatch import wake as wake_up
from tasks.hints import Background
from tasks.tracing import Tracing, make_provider
from tests.integration.conftest import MakeApp, make_topic
from tests.support import finish, wait_until
from tests.support_commands import declare_jobs


class Traced:
    """An app that traces into memory, with a worker in a thread."""

    def __init__(self, app: TidemarkApp, spans: InMemorySpanExporter) -> None:
        self.app = app
        self._spans = spans

    def named(self, name: str, count: int = 1) -> list[ReadableSpan]:
        """The finished spans of a name, once there are as many."""

        def the_spans_have_ended() -> list[ReadableSpan]:
            found = [s for s in self._spans.get_finished_spans() if s.name == name]
            return found if len(found) >= count else []

        return wait_until(the_spans_have_ended, timeout=20)

    def one(self, name: str) -> ReadableSpan:
        (span,) = self.named(name)
        return span

    def names(self) -> list[str]:
        return [s.name for s in self._spans.get_finished_spans()]


def trace_with(app: TidemarkApp, provider: TracerProvider) -> Tracing:
    tracing = Tracing(app, provider)
    app._parts[Tracing] = tracing
    return tracing


def close(tracing: Tracing) -> None:
    for signal, receiver in (
        (signals.before_task_publish, tracing._before_publish),
        (signals.task_prerun, tracing._before_task),
        (signals.task_postrun, tracing._after_task),
        (signals.worker_process_shutdown, tracing._flush),
    ):
        signal.disconnect(receiver)
    tracing._flush()


@pytest.fixture
def traced(make_app: MakeApp, tmp_path: Path) -> Iterator[Traced]:
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    # Tracing is made by the test, with a provider of its own.
    app = make_app(data_dir=tmp_path, shards=2, tracing=True)
    declare_jobs(app)
    tracing = trace_with(app, provider)
    with start_worker(app, pool="solo", perform_ping_check=False, queues=all_queues(2), loglevel="WARNING"):
        yield Traced(app, spans)
    close(tracing)


@pytest.fixture
def orders(conn: Connection[TupleRow]) -> list[int]:
    return make_topic(conn, partitions=4)


def commit(app: TidemarkApp, conn: Connection[Any], key: str, partitions: Sequence[int], *, wake: bool = False) -> None:
    count = len(partitions)
    with committing(app, key, partitions):
        commit_object(conn, key, partitions, [1] * count, [0] * count, [1] * count, [0] * count)
        if wake:
            wake_up(app, partitions)
    finish(app.once(Background))


def context_of(span: ReadableSpan) -> SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


def trace_of(span: ReadableSpan) -> int:
    return context_of(span).trace_id


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    return (
        child.parent is not None
        and trace_of(child) == trace_of(parent)
        and child.parent.span_id == context_of(parent).span_id
    )


def test_a_commit_that_fan_out_finds(traced: Traced, conn: Connection[TupleRow], orders: list[int]) -> None:
    commit(traced.app, conn, "a", orders[:1])
    traced.app.tasks["tasks.fan_out"].delay()
    committed, published, done = map(traced.one, ("commit", "publish tasks.materialize", "tasks.materialize"))
    assert is_child(published, committed)
    assert is_child(done, published)
    assert (published.kind, done.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    found = traced.one("tasks.fan_out")
    assert [link.context.span_id for link in published.links] == [context_of(found).span_id]
    assert (committed.attributes or {})["tidemark.object_key"] == "a"
    assert (done.attributes or {})["tidemark.events_processed"] == 1


def test_a_commit_that_wakes_its_partitions(traced: Traced, conn: Connection[TupleRow], orders: list[int]) -> None:
    commit(traced.app, conn, "a", orders[:1], wake=True)
    committed, published, done = map(traced.one, ("commit", "publish tasks.materialize", "tasks.materialize"))
    assert is_child(published, committed)
    assert is_child(done, published)
    assert traced.app.redis
    assert traced.app.redis.keys("tidemark:trace:*") == [], "nothing is left for fan-out to take up"


def test_commits_that_share_a_task(traced: Traced, conn: Connection[TupleRow], orders: list[int]) -> None:
    for key in "abc":
        commit(traced.app, conn, key, [orders[0]])
    traced.app.tasks["tasks.fan_out"].delay()
    published = traced.one("publish tasks.materialize")
    first, *others = traced.named("commit", 3)
    assert is_child(published, first)
    linked = {link.context.trace_id for link in published.links}
    assert {trace_of(span) for span in others} < linked
    assert is_child(traced.one("tasks.materialize"), published)


def test_a_commit_without_a_trace(traced: Traced, conn: Connection[TupleRow], orders: list[int]) -> None:
    """A broker that speaks SQL: its materialization belongs to the fan-out that found it."""
    commit_object(conn, "a", orders[:1], [1], [0], [1], [0])
    traced.app.tasks["tasks.fan_out"].delay()
    published, found = traced.one("publish tasks.materialize"), traced.one("tasks.fan_out")
    assert is_child(published, found)


def test_an_idle_fan_out_leaves_nothing_and_a_failed_job_its_error(traced: Traced) -> None:
    for _ in range(3):
        traced.app.tasks["tasks.fan_out"].delay()
    # The same queue, one task at a time: when this one is over, so are those.
    traced.app.tasks["tasks.materialize_topic"].delay("nosuch")
    failed = traced.one("tasks.materialize_topic")
    assert failed.status.status_code is StatusCode.ERROR
    assert [event.name for event in failed.events] == ["exception"]
    assert traced.names() == ["tasks.materialize_topic"]


def test_a_trace_that_is_not_sampled_is_not_noted(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(data_dir=tmp_path, shards=2, tracing=True)
    tracing = trace_with(app, TracerProvider(sampler=ALWAYS_OFF))
    with committing(app, "a", [1]):
        pass
    finish(app.once(Background))
    finish(app.once(Background))
    finish(app.once(Background))
    assert app.redis
    assert app.redis.keys("tidemark:trace:*") == []
    close(tracing)


def test_a_failed_commit_notes_nothing(traced: Traced, conn: Connection[TupleRow]) -> None:
    with pytest.raises(Exception, match="999"):
        commit(traced.app, conn, "a", [999])
    assert traced.app.redis
    assert traced.app.redis.keys("tidemark:trace:*") == []
    assert traced.one("commit").status.status_code is StatusCode.ERROR


def test_an_exporter_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "nosuch")
    with pytest.raises(SettingsError, match=r"no exporter 'nosuch'.*use one of: .*console"):
        make_provider()


@pytest.mark.parametrize(("value", "loaded"), [("0", False), ("1", True)])
def test_it_is_loaded_only_when_asked_for(value: str, loaded: bool) -> None:  # noqa: FBT001 - a parameter
    script = (
        "import sys, tasks; from tasks import dispatch; "
        "tasks.app.conf.task_routes; dispatch.committing(tasks.app, 'a', [1]); "
        "print('opentelemetry.sdk.trace' in sys.modules, 'tasks.tracing' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "TIDEMARK_TRACING": value,
            "TIDEMARK_DATABASE_URL": "postgresql://127.0.0.1:1/x",
            "TIDEMARK_BROKER_URL": "redis://127.0.0.1:1/0",
            "OTEL_TRACES_EXPORTER": "console",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )
    assert (done.stdout.split(), done.returncode) == ([str(loaded)] * 2, 0), done.stderr
