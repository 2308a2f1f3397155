"""Prometheus metrics of the whole installation, from one program.

Three sources, read side by side when Prometheus asks: Postgres (backlog, lag, what is open, sizes), Redis (what the
workers added up, see `tasks.metrics`) and the broker (heartbeats of the workers, depth of the queues). A source that
does not answer in time leaves its metrics out and says so in `tidemark_exporter_source_up`; the others go on.

What a scrape costs the servers is bounded: a source is read at most every `metrics_seconds`, and never more than a
tenth of the time, so that a database where it takes long is asked less often. Labels are bounded as well: topics by
`metrics_topics`, workers by `_WORKERS`, everything else is a fixed set.
"""

import http.client
import json
import logging
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import accumulate
from types import TracebackType
from typing import Any, Self
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector
from redis import Redis

from config.celery import is_redis
from config.errors import TidemarkError
from config.queues import all_queues
from db.pool import Database
from db.status import Figures, read_figures
from tasks.app import TidemarkApp
from tasks.metrics import BUCKETS, FAMILIES, MICROSECONDS, OTHER, Family, read

log = logging.getLogger(__name__)

DEFAULT_PORT = 9890
_PREFIX = "tidemark_"
# Below Prometheus' scrape timeout of 10 s.
_ANSWER_SECONDS = 5.0
# So many times as long as it took to read it a source is left alone.
_REST = 9
_WORKERS = 500
_WORKER_GONE_SECONDS = 3600.0
_WORKER_SILENT_SECONDS = 60.0


class ServerError(TidemarkError):
    """The exporter cannot listen where it was told to, or not hear what it should."""


# --- Building metrics


def _gauge(name: str, help_text: str, values: float | Mapping[tuple[str, ...], float], *labels: str) -> Metric:
    metric = GaugeMetricFamily(_PREFIX + name, help_text, labels=labels)
    return _fill(metric, values)


def _counter(name: str, help_text: str, values: float | Mapping[tuple[str, ...], float], *labels: str) -> Metric:
    metric = CounterMetricFamily(_PREFIX + name, help_text, labels=labels)
    return _fill(metric, values)


def _fill(metric: Any, values: float | Mapping[tuple[str, ...], float]) -> Metric:
    for labels, value in values.items() if isinstance(values, Mapping) else [((), values)]:
        metric.add_metric(labels, value)
    made: Metric = metric
    return made


# --- Sources


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a source said; `error` when it said nothing."""

    metrics: tuple[Metric, ...] = ()
    seconds: float = 0.0
    error: str | None = None


class Source:
    """One server's metrics, remembered for a while."""

    def __init__(self, name: str, read: Callable[[], Iterable[Metric]], *, seconds: float) -> None:
        self.name = name
        self._read = read
        self._seconds = seconds
        self._lock = threading.Lock()
        self._reading: Reading | None = None
        self._until = 0.0

    def reading(self) -> Reading:
        """The last reading, or a new one when its time is over."""
        with self._lock:
            if self._reading is None or time.monotonic() >= self._until:
                self._reading = self._take()
                self._until = time.monotonic() + max(self._seconds, _REST * self._reading.seconds)
            return self._reading

    def _take(self) -> Reading:
        began = time.perf_counter()
        try:
            metrics = tuple(self._read())
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sources go on
            message = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("a source of metrics does not answer", extra={"source": self.name, "error": message})
            return Reading(error=message)
        return Reading(metrics=metrics, seconds=time.perf_counter() - began)


class AllSources(Collector):
    """Reads the sources side by side: one that hangs costs no more than its time-out."""

    def __init__(self, sources: Iterable[Source]) -> None:
        self._sources = tuple(sources)
        self._pool = ThreadPoolExecutor(len(self._sources), thread_name_prefix="source")

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        readings = dict(
            zip(
                [source.name for source in self._sources],
                self._pool.map(Source.reading, self._sources),
                strict=True,
            )
        )
        yield _gauge("build_info", "Version of the exporter.", {(version("tidemark"),): 1}, "version")
        yield _gauge(
            "exporter_source_up",
            "Whether a source of these metrics answered when it was last asked.",
            {(name,): reading.error is None for name, reading in readings.items()},
            "source",
        )
        yield _gauge(
            "exporter_source_duration_seconds",
            "Time it took to read a source.",
            {(name,): reading.seconds for name, reading in readings.items()},
            "source",
        )
        for reading in readings.values():
            yield from reading.metrics

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


# --- Postgres


class PostgresSource:
    """Reads the database over a connection of its own, which gives up early."""

    def __init__(self, app: TidemarkApp) -> None:
        self._app = app
        self._database: Database | None = None

    def __call__(self) -> Iterable[Metric]:
        settings = self._app.settings
        if self._database is None:
            impatient = {
                "pool_open": 1,
                "pool_wait": _ANSWER_SECONDS,
                "statement_timeout": _ANSWER_SECONDS,
                "lock_timeout": 1.0,
            }
            self._database = Database(self._app.database_url, settings.model_copy(update=impatient), threads=1)
        with self._database.connection() as conn:
            return postgres_metrics(
                read_figures(conn, topics=settings.metrics_topics, overdue_seconds=overdue_seconds(self._app))
            )

    def close(self) -> None:
        if self._database is not None:
            self._database.close()


def overdue_seconds(app: TidemarkApp) -> float:
    """After this time an event was dispatched by two sweeps, and its task had time to run: something holds it up."""
    return 2 * app.settings.sweep_interval + app.settings.hard_time_limit


def postgres_metrics(found: Figures) -> list[Metric]:
    """Metrics of the database's figures."""
    labels = {(t.name or OTHER,): t for t in found.topics}
    audited = [t.audited_at for t in found.topics if t.audited_at is not None]
    return [
        _gauge("topics", "Topics.", sum(t.topics for t in found.topics)),
        _gauge("partitions", "Partitions of a topic.", {k: t.partitions for k, t in labels.items()}, "topic"),
        _counter(
            "records",
            "Sum of the end offsets of a topic's partitions: every record that ever got an offset.",
            {k: t.end_offsets for k, t in labels.items()},
            "topic",
        ),
        _gauge(
            "log_records", "Records between start and end offset.", {k: t.records for k, t in labels.items()}, "topic"
        ),
        _gauge(
            "log_bytes",
            "Bytes in object storage of the batches between start and end offset.",
            {k: t.bytes for k, t in labels.items()},
            "topic",
        ),
        _gauge(
            "backlog_events",
            "Committed events that have no offset yet; a lower bound while tidemark_backlog_count_capped is 1.",
            {k: t.events for k, t in labels.items()},
            "topic",
        ),
        _gauge(
            "backlog_partitions",
            "Partitions with such events.",
            {k: t.waiting for k, t in labels.items()},
            "topic",
        ),
        _gauge(
            "backlog_overdue_partitions",
            "Partitions whose oldest such event has waited through two sweeps and a task's time limit.",
            {k: t.overdue for k, t in labels.items()},
            "topic",
        ),
        _gauge("backlog_count_capped", "Whether counting the backlog stopped at its limit.", found.capped),
        _gauge(
            "lag_seconds",
            "Age of the oldest committed event that has no offset yet.",
            {k: t.lag for k, t in labels.items()},
            "topic",
        ),
        _gauge(
            "open_transactions",
            "Open transactions that have an id: what they commit comes late (counted up to 100).",
            found.open_transactions,
        ),
        _gauge("open_transaction_seconds", "Age of the oldest of them.", found.open_seconds),
        _gauge(
            "vacuum_held_seconds",
            "How long sessions, standbys, prepared transactions and slots have kept dead rows from vacuum.",
            {(kind,): seconds for kind, seconds in found.held_seconds.items()},
            "holder",
        ),
        _gauge(
            "lock_waiting_sessions", "Database sessions that wait for a lock (counted up to 100).", found.lock_waits
        ),
        _gauge("lock_wait_longest_seconds", "How long the longest of them has waited.", found.lock_wait_seconds),
        _gauge(
            "fan_out_last_found_timestamp_seconds",
            "When fan-out last found commits, in seconds since the epoch.",
            time.time() - found.dispatch.last,
        ),
        _gauge(
            "fan_out_waiting_seconds",
            "Age of the oldest commit that fan-out has not seen; 0 where there is none.",
            found.dispatch.undispatched or 0.0,
        ),
        _gauge(
            "cluster_matches",
            "Whether the database is in the cluster its log belongs to; after a restore elsewhere it is not.",
            found.dispatch.own_cluster,
        ),
        _gauge(
            "audit_progress_timestamp_seconds",
            "When an audit last read new batches, in seconds since the epoch.",
            {(): max(audited)} if audited else {},
        ),
        _gauge("audit_unread_records", "Records that no audit has read yet.", sum(t.unaudited for t in found.topics)),
        _gauge(
            "database_connections",
            "Sessions of the database by state, Tidemark's own and other ones.",
            _sum(((("tidemark" if c.ours else "other"), c.state), c.sessions) for c in found.connections),
            "application",
            "state",
        ),
        _gauge("database_connections_limit", "Sessions that the server admits.", found.max_connections),
        _gauge(
            "table_size_bytes",
            "Size of a table on disk, without its indexes.",
            {(t.name,): t.bytes for t in found.tables},
            "table",
        ),
        _gauge(
            "table_live_rows", "Rows of a table, estimated.", {(t.name,): t.live_rows for t in found.tables}, "table"
        ),
        _gauge(
            "table_dead_rows",
            "Rows that vacuum has to remove, estimated.",
            {(t.name,): t.dead_rows for t in found.tables},
            "table",
        ),
        _gauge(
            "index_size_bytes",
            "Size of an index on disk.",
            {(i.table, i.name): i.bytes for i in found.indexes},
            "table",
            "index",
        ),
    ]


def _sum(values: Iterable[tuple[tuple[str, ...], float]]) -> dict[tuple[str, ...], float]:
    total: dict[tuple[str, ...], float] = defaultdict(float)
    for labels, value in values:
        total[labels] += value
    return total


# --- Redis: what the workers added up


def worker_metrics(stored: Mapping[str, str]) -> list[Metric]:
    """Metrics of the figures in Redis. Each one is there, if only as 0 where it has no labels."""
    by_name: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for field, value in stored.items():
        name, *labels = field.split("|")
        by_name[name][tuple(labels)] = float(value)
    metrics: list[Metric] = []
    for family in FAMILIES:
        values = by_name.get(family.name, {})
        if family.histogram:
            metrics.append(_histogram(family, values))
            continue
        if family.time:
            values = {labels: value / MICROSECONDS for labels, value in values.items()}
        if not family.labels and not values:
            values = {(): 0.0}
        metrics.append(_counter(family.name, family.help, values, *family.labels))
    for name, help_text in (
        ("audit_last_violations", "Broken invariants that the last run of tasks.audit met."),
        ("audit_last_timestamp_seconds", "When that was, in seconds since the epoch."),
    ):
        metrics.append(_gauge(name, help_text, by_name.get(name, {})))
    return metrics


def _histogram(family: Family, values: Mapping[tuple[str, ...], float]) -> Metric:
    metric = HistogramMetricFamily(_PREFIX + family.name, family.help, labels=family.labels)
    bounds = [*(str(bound) for bound in BUCKETS), "+Inf"]
    for labels in sorted({labels[:-1] for labels in values}):
        counts = accumulate(values.get((*labels, str(n)), 0.0) for n in range(len(bounds)))
        total = values.get((*labels, "sum"), 0.0) / MICROSECONDS
        metric.add_metric(labels, buckets=list(zip(bounds, counts, strict=True)), sum_value=total)
    return metric


# --- Redis: who leases which shards


def lease_metrics(redis: "Redis", shards: int) -> list[Metric]:
    """Leases as `tasks.leases` keeps them; static workers take part in none."""
    prefix = f"tidemark:leases:{shards}:"
    with redis.pipeline(transaction=True) as pipeline:
        pipeline.time()
        pipeline.zrange(f"{prefix}members", 0, -1, withscores=True)
        pipeline.hgetall(f"{prefix}owners")
        (now, _), members, owners = pipeline.execute()
    living = {name for name, until in members if until > now * 1000}
    return [
        _gauge("shards", "Shards, as the exporter is configured.", shards),
        _gauge("lease_members", "Workers that share the shards out among themselves.", len(living)),
        _gauge("leased_shards", "Shards that one of them leases.", sum(owner in living for owner in owners.values())),
    ]


# --- The broker: queues and the workers' heartbeats


@dataclass(slots=True)
class Seen:
    """A worker as its last heartbeat described it."""

    at: float
    active: int = 0
    processed: int = 0


class Heartbeats:
    """Listens to the heartbeats that Celery's workers send anyway, in a thread of its own."""

    def __init__(self, app: TidemarkApp) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._workers: dict[str, Seen] = {}
        self._stop = threading.Event()
        self._receiver: Any = None
        # Why nothing is heard, if so.
        self.error: str | None = None
        self._thread = threading.Thread(target=self._listen, name="heartbeats", daemon=True)
        self._thread.start()

    def seen(self) -> dict[str, Seen]:
        """The workers heard of within the last hour that did not say goodbye; the latest, if there are very many."""
        with self._lock:
            oldest = time.time() - _WORKER_GONE_SECONDS
            latest = sorted(self._workers.items(), key=lambda item: item[1].at, reverse=True)[:_WORKERS]
            self._workers = {name: worker for name, worker in latest if worker.at >= oldest}
            return dict(self._workers)

    def close(self) -> None:
        self._stop.set()
        if self._receiver is not None:
            self._receiver.should_stop = True
        self._thread.join(_ANSWER_SECONDS)

    def _listen(self) -> None:
        while not self._stop.is_set():
            try:
                with self._app.connection_for_read() as connection:
                    connection.ensure_connection(max_retries=1, timeout=_ANSWER_SECONDS)
                    self._capture(connection)
            except Exception as error:  # noqa: BLE001 - a broker that is away comes back
                self.error = " ".join(f"{type(error).__name__}: {error}".split())
            self._stop.wait(1)

    def _capture(self, connection: Any) -> None:
        self._receiver = receiver = self._app.events.Receiver(
            connection,
            handlers={
                "worker-heartbeat": self._heard,
                "worker-online": self._heard,
                "worker-offline": self._gone,
            },
            routing_key="worker.#",
        )
        self.error = None
        # The interval is how soon it hears that it is to stop.
        for _ in receiver.consume(limit=None, timeout=None, safety_interval=0.3, wakeup=True):
            if self._stop.is_set():
                return

    def _heard(self, event: Mapping[str, Any]) -> None:
        # By our clock: theirs may differ.
        worker = Seen(at=time.time(), active=int(event.get("active") or 0), processed=int(event.get("processed") or 0))
        with self._lock:
            self._workers[str(event["hostname"])] = worker

    def _gone(self, event: Mapping[str, Any]) -> None:
        with self._lock:
            self._workers.pop(str(event["hostname"]), None)


class BrokerSource:
    """Queue depths from a Redis broker, and the workers that were heard of."""

    def __init__(self, app: TidemarkApp, heartbeats: Heartbeats) -> None:
        self._app = app
        self._heartbeats = heartbeats
        self._redis: Redis | None = None

    def __call__(self) -> Iterable[Metric]:
        if self._heartbeats.error is not None:
            raise ServerError(self._heartbeats.error)
        depths = self._depths() if is_redis(self._app.broker_url) else {}
        seen = self._heartbeats.seen()
        recent = time.time() - _WORKER_SILENT_SECONDS
        return [
            _gauge("queue_tasks", "Tasks that wait in a queue, those handed to a worker left out.", depths, "queue"),
            _gauge("workers", "Workers heard of within the last minute.", sum(w.at >= recent for w in seen.values())),
            _gauge(
                "worker_heartbeat_timestamp_seconds",
                "When a worker was last heard of, in seconds since the epoch. Gone when it stops, or an hour later.",
                {(name,): w.at for name, w in seen.items()},
                "worker",
            ),
            _gauge("worker_active_tasks", "Tasks a worker runs.", {(n,): w.active for n, w in seen.items()}, "worker"),
            _counter("worker_tasks", "Tasks since its start.", {(n,): w.processed for n, w in seen.items()}, "worker"),
        ]

    def _depths(self) -> dict[tuple[str, ...], float]:
        if self._redis is None:
            url = self._app.broker_url.replace("redis+socket://", "unix://", 1)
            self._redis = Redis.from_url(url, socket_connect_timeout=_ANSWER_SECONDS, socket_timeout=_ANSWER_SECONDS)
        queues = all_queues(self._app.settings.shards)
        with self._redis.pipeline(transaction=False) as pipeline:
            for queue in queues:
                pipeline.llen(queue)
            return {(queue,): depth for queue, depth in zip(queues, pipeline.execute(), strict=True)}


# --- The program


class _Quiet(WSGIRequestHandler):
    def log_message(self, *_: Any) -> None:
        """A line for every scrape says nothing."""


class Exporter:
    """Serves the metrics until it is left."""

    def __init__(self, app: TidemarkApp, address: str, port: int) -> None:
        self._address = address
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        server: type[WSGIServer] = type("Server", (ThreadingWSGIServer,), {"address_family": family})
        try:
            self._server = make_server(address, port, self._answer, server_class=server, handler_class=_Quiet)
        except (OSError, OverflowError) as error:
            raise ServerError(f"cannot listen on {address} port {port}: {error}") from None
        self._postgres = PostgresSource(app)
        self._heartbeats = Heartbeats(app)
        seconds = app.settings.metrics_seconds
        sources = [
            Source("postgres", self._postgres, seconds=seconds),
            Source("broker", BrokerSource(app, self._heartbeats), seconds=seconds),
        ]
        if app.redis is not None:
            redis = app.redis
            shards = app.settings.shards
            sources.append(
                Source(
                    "redis",
                    lambda: worker_metrics(read(redis)) + lease_metrics(redis, shards),
                    seconds=seconds,
                )
            )
        self._sources = AllSources(sources)
        registry = CollectorRegistry()
        registry.register(self._sources)
        self._metrics = make_wsgi_app(registry)
        self._thread = threading.Thread(target=self._server.serve_forever, name="http", daemon=True)

    @property
    def port(self) -> int:
        return int(self._server.server_port)

    @property
    def url(self) -> str:
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self.port}/"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._heartbeats.close()
        self._sources.close()
        self._postgres.close()

    def answers(self) -> bool:
        """Whether a request of our own is answered."""
        any_address = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - not bound, replaced
        connection = http.client.HTTPConnection(any_address.get(self._address, self._address), self.port, timeout=3)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK
        except OSError:
            return False
        finally:
            connection.close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            metrics: Iterable[bytes] = self._metrics(environ, start_response)
            return metrics
        pages = {
            "/": ("text/html; charset=utf-8", b'<!doctype html><title>Tidemark</title><a href="metrics">metrics</a>\n'),
            "/health": ("application/json", json.dumps({"alive": True}).encode()),
        }
        if path in pages:
            kind, body = pages[path]
            start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
            return [body]
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"not found; metrics are at /metrics\n"]
