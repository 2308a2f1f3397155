"""Prometheus metrics of the whole installation, from one program.

Three sources, read side by side when Prometheus asks: Postgres (backlog, lag, what is open, sizes), Redis (what the
workers count, see `tasks.metrics`, and their leases) and the broker (heartbeats of the workers, depth of the queues).
A source that does not answer in time leaves its metrics out and says so in `tidemark_exporter_source_up`; the others
are shown. A server that hangs answers nothing and ends nothing, so each source is read by a thread of its own, and a
scrape waits for it no longer than `_ANSWER_SECONDS`.

What a scrape costs the servers is bounded: a source is read at most every `metrics_seconds`, and never more than a
tenth of the time, so that a database where it takes long is asked less often. Labels are bounded as well: topics by
`metrics_topics`, workers by `_WORKERS`, everything else is a fixed set.
"""

import http.client
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from functools import partial
from importlib.metadata import version
from itertools import accumulate
from typing import Any, NamedTuple, Self

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from redis import Redis

from config.errors import TidemarkError
from config.queues import all_queues
from config.redis import RedisAddress, is_redis
from db.pool import connect
from db.status import HOLDER_KINDS, read_figures
from tasks.app import TidemarkApp
from tasks.hints import read_programs, redis_time
from tasks.metrics import BUCKETS, FAMILIES, MICROSECONDS, OTHER, Family, read

log = logging.getLogger(__name__)

DEFAULT_PORT = 9890
_PREFIX = "tidemark_"
# A scrape has to end well before Prometheus gives it up (10 s): then no source would be known to be down.
_ANSWER_SECONDS = 3.0
_REDIS_SECONDS = 1.0
# A source is left alone this many times as long as it took to read it.
_REST = 9
_WORKERS = 500
# A worker that went without a goodbye has a series for this long: enough to tell by name who is missing.
_WORKER_GONE_SECONDS = 900.0
_WORKER_SILENT_SECONDS = 60.0

# One, or by label, or by labels; None is no sample.
Values = float | Mapping[Any, float] | None


def _gauge(name: str, help_text: str, values: Values, *labels: str, kind: Any = GaugeMetricFamily) -> Metric:
    metric: Any = kind(_PREFIX + name, help_text, labels=labels)
    samples = values if isinstance(values, Mapping) else {} if values is None else {(): values}
    for key, value in samples.items():
        metric.add_metric((key,) if isinstance(key, str) else key, value)
    made: Metric = metric
    return made


_counter = partial(_gauge, kind=CounterMetricFamily)


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


# --- Sources


class Reading(NamedTuple):
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
        self._reading = Reading()
        self._until = 0.0
        self._thread: threading.Thread | None = None

    def ask(self) -> None:
        """Begin to read it, if its time has come and nobody is still waiting for it."""
        with self._lock:
            if self._thread is None and time.monotonic() >= self._until:
                # A daemon: one that hangs must not keep the program from ending.
                self._thread = threading.Thread(target=self._take, name=self.name, daemon=True)
                self._thread.start()

    def reading(self, until: float) -> Reading:
        """The last reading; one without metrics when it has not answered by `until`."""
        thread = self._thread
        if thread is not None:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                return self._failed("it hangs")
        return self._reading

    def _take(self) -> None:
        began = time.perf_counter()
        try:
            reading = Reading(tuple(self._read()), time.perf_counter() - began)
        except Exception as error:  # noqa: BLE001 - whatever it is, the other sources go on
            reading = self._failed(_said(error))
        with self._lock:
            self._reading = reading
            # One that hung for an hour is not left alone for nine.
            self._until = time.monotonic() + max(self._seconds, _REST * min(reading.seconds, _ANSWER_SECONDS))
            self._thread = None

    def _failed(self, error: str) -> Reading:
        log.warning("a source of metrics does not answer", extra={"source": self.name, "error": error})
        return Reading(error=error)


# --- Postgres


# Of each topic: a field of its figures, whether it only grows, the metric and its help.
_OF_A_TOPIC = (
    ("partitions", False, "partitions", "Partitions of a topic."),
    ("end_offsets", True, "records", "Sum of the end offsets of a topic's partitions: what ever got an offset."),
    ("records", False, "log_records", "Records between start and end offset."),
    ("bytes", False, "log_bytes", "Bytes in object storage of the batches between start and end offset."),
    ("events", False, "backlog_events", "Committed events without an offset; more while the count is capped."),
    ("waiting", False, "backlog_partitions", "Partitions with such events."),
    ("overdue", False, "backlog_overdue_partitions", "Partitions where one has outlasted two sweeps and a task."),
    ("lag", False, "lag_seconds", "Age of the oldest committed event that has no offset yet."),
)
_OF_A_TABLE = (
    ("bytes", "table_size_bytes", "Size of a table on disk, without its indexes."),
    ("live_rows", "table_live_rows", "Rows of a table, estimated."),
    ("dead_rows", "table_dead_rows", "Rows that vacuum has to remove, estimated."),
)


def read_postgres(app: TidemarkApp) -> Iterator[Metric]:
    """Over a connection of its own, which gives up early."""
    settings = app.settings
    impatient = settings.model_copy(update={"statement_timeout": _ANSWER_SECONDS, "lock_timeout": 1.0})
    with connect(app.database_url, impatient, timeout=2 * _ANSWER_SECONDS) as conn:
        found = read_figures(conn, topics=settings.metrics_topics, overdue_seconds=settings.overdue_seconds)
    for field, grows, name, help_text in _OF_A_TOPIC:
        values = {topic.name or OTHER: getattr(topic, field) for topic in found.topics}
        yield (_counter if grows else _gauge)(name, help_text, values, "topic")
    for field, name, help_text in _OF_A_TABLE:
        yield _gauge(name, help_text, {table.name: getattr(table, field) for table in found.tables}, "table")
    sizes = {(index.table, index.name): index.bytes for index in found.indexes}
    yield _gauge("index_size_bytes", "Size of an index on disk.", sizes, "table", "index")
    sessions = {("tidemark" if group.ours else "other", group.state): group.sessions for group in found.connections}
    yield _gauge("database_connections", "Sessions of the database.", sessions, "application", "state")
    held = {kind: _longest(h.seconds for h in found.holders if h.kind == kind) for kind in HOLDER_KINDS}
    yield _gauge("vacuum_held_seconds", "For how long something has kept dead rows from vacuum.", held, "holder")
    dispatch = found.dispatch
    waiting, found_at = dispatch.undispatched or 0.0, time.time() - dispatch.last
    audited = max((topic.audited_at for topic in found.topics if topic.audited_at is not None), default=None)
    unread = sum(topic.unaudited for topic in found.topics)
    yield _gauge("topics", "Topics.", sum(topic.topics for topic in found.topics))
    yield _gauge("backlog_count_capped", "Whether counting the backlog stopped at its limit.", found.capped)
    late, own = [holder.seconds for holder in found.holders if holder.has_id], dispatch.own_cluster
    yield _gauge("open_transactions", "Open transactions with an id, up to 100: they commit late.", len(late))
    yield _gauge("open_transaction_seconds", "Age of the oldest of them.", _longest(late))
    waiters, longest = len({wait.pid for wait in found.lock_waits}), _longest(w.waited for w in found.lock_waits)
    yield _gauge("lock_waiting_sessions", "Database sessions that wait for a lock, up to 100.", waiters)
    yield _gauge("lock_wait_longest_seconds", "How long the longest of them has waited.", longest)
    yield _gauge("deleted_partitions", "Partitions of deleted topics yet to be purged.", found.leftovers.partitions)
    yield _gauge("dead_objects", "Objects that can go from storage, up to 100,000.", found.leftovers.objects)
    yield _gauge("fan_out_last_found_timestamp_seconds", "When fan-out last found commits.", found_at)
    yield _gauge("fan_out_waiting_seconds", "Age of the oldest commit no fan-out has seen, or 0.", waiting)
    yield _gauge("audit_progress_timestamp_seconds", "When an audit last read batches.", audited)
    yield _gauge("audit_unread_records", "Records that no audit has read yet.", unread)
    yield _gauge("database_connections_limit", "Sessions that the server admits.", found.connections[0].allowed)
    yield _gauge("cluster_matches", "Whether the database is in its log's cluster; a restored one is not.", own)


def _longest(seconds: Iterable[float | None]) -> float:
    return max((s or 0.0 for s in seconds), default=0.0)


# --- Redis: what the workers count, and who leases which shards


def worker_metrics(stored: Mapping[str, str]) -> list[Metric]:
    """Metrics of the values in Redis. Each one is there, if only as 0 where it is a counter without labels."""
    by_name: dict[str, dict[tuple[str, ...], float]] = defaultdict(dict)
    for field, value in stored.items():
        name, *labels = field.split("|")
        by_name[name][tuple(labels)] = float(value)
    metrics: list[Metric] = []
    for family in FAMILIES:
        values = by_name[family.name]
        if family.kind == "histogram":
            metrics.append(_histogram(family, values))
            continue
        if family.kind == "counter":
            unit = MICROSECONDS if family.time else 1
            values = {labels: value / unit for labels, value in values.items()} or ({} if family.labels else {(): 0.0})
        build = _counter if family.kind == "counter" else _gauge
        metrics.append(build(family.name, family.help, values, *family.labels))
    return metrics


def _histogram(family: Family, values: Mapping[tuple[str, ...], float]) -> Metric:
    metric = HistogramMetricFamily(_PREFIX + family.name, family.help, labels=family.labels)
    bounds = [*map(str, BUCKETS), "+Inf"]
    for labels in sorted({labels[:-1] for labels in values}):
        counts = accumulate(values.get((*labels, str(n)), 0.0) for n in range(len(bounds)))
        total = values.get((*labels, "sum"), 0.0) / MICROSECONDS
        metric.add_metric(labels, buckets=list(zip(bounds, counts, strict=True)), sum_value=total)
    return metric


def lease_metrics(redis: Redis, shards: int) -> list[Metric]:
    """Who has which shards, as the workers tell (`tasks.leases`), and the programs that live."""
    programs = read_programs(redis, redis_time(redis)).values()
    sharing = [p for p in programs if p.leases and p.shards == shards]
    ticked = max((p.seen for p in programs if p.program == "beat"), default=None)
    return [
        _gauge("shards", "Shards, as the exporter is configured.", shards),
        _gauge("lease_members", "Workers that share the shards out among themselves.", len(sharing)),
        _gauge("leased_shards", "Shards that one of them consumes.", len({s for p in sharing for s in p.consumes})),
        _gauge("beat_last_tick_timestamp_seconds", "When a beat last said that it ticks.", ticked),
    ]


# --- The broker: queues and the workers' heartbeats


class Broker:
    """Queue depths from a Redis broker, and the heartbeats that Celery's workers send anyway, heard by a thread."""

    def __init__(self, app: TidemarkApp) -> None:
        self._app = app
        self._queues = all_queues(app.settings.shards)
        address = app.broker_url
        self._redis = RedisAddress.parse(address).client(seconds=_REDIS_SECONDS) if is_redis(address) else None
        # By name: the last heartbeat, and by our clock when it came.
        self._workers: dict[str, tuple[float, Mapping[str, Any]]] = {}
        self._stop = threading.Event()
        self._receiver: Any = None
        # Why nothing is heard, if so.
        self._error: str | None = None
        self._thread = threading.Thread(target=self._listen, name="heartbeats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def __call__(self) -> Iterator[Metric]:
        if self._error is not None:
            raise TidemarkError(self._error)
        depths: dict[str, float] = {}
        if self._redis is not None:
            with self._redis.pipeline(transaction=False) as pipeline:
                for queue in self._queues:
                    pipeline.llen(queue)
                depths = dict(zip(self._queues, pipeline.execute(), strict=True))
        # Those heard of lately that did not say goodbye; the latest, if there are very many.
        now = time.time()
        latest = sorted(self._workers.copy().items(), key=lambda worker: worker[1][0], reverse=True)
        there = {name: heard for name, heard in latest[:_WORKERS] if heard[0] >= now - _WORKER_GONE_SECONDS}
        for name in self._workers.keys() - there.keys():
            self._workers.pop(name, None)
        heard = {name: at for name, (at, _) in there.items()}
        recent = sum(at >= now - _WORKER_SILENT_SECONDS for at in heard.values())
        active, processed = (
            {name: int(event.get(field) or 0) for name, (_, event) in there.items()}
            for field in ("active", "processed")
        )
        yield _gauge("queue_tasks", "Tasks that wait in a queue, those handed to a worker left out.", depths, "queue")
        yield _gauge("workers", "Workers heard of within the last minute.", recent)
        yield _gauge("worker_heartbeat_timestamp_seconds", "When a worker was last heard of.", heard, "worker")
        yield _gauge("worker_active_tasks", "Tasks a worker runs.", active, "worker")
        yield _counter("worker_tasks", "Tasks since its start.", processed, "worker")

    def close(self) -> None:
        self._stop.set()
        if self._receiver is not None:
            self._receiver.should_stop = True
        self._thread.join(_ANSWER_SECONDS)

    def _listen(self) -> None:
        handlers = {"worker-heartbeat": self._heard, "worker-online": self._heard, "worker-offline": self._gone}
        while not self._stop.is_set():
            try:
                with self._app.connection_for_read() as connection:
                    connection.ensure_connection(max_retries=1, timeout=_ANSWER_SECONDS)
                    receiver = self._app.events.Receiver(connection, handlers=handlers, routing_key="worker.#")
                    self._receiver, self._error = receiver, None
                    # The interval is how soon it hears that it is to stop.
                    for _ in receiver.consume(limit=None, timeout=None, safety_interval=0.3, wakeup=True):
                        if self._stop.is_set():
                            return
            except Exception as error:  # noqa: BLE001 - a broker that is away comes back
                self._error = _said(error)
            self._stop.wait(1)

    def _heard(self, event: Mapping[str, Any]) -> None:
        # By our clock: theirs may differ.
        self._workers[str(event["hostname"])] = time.time(), event

    def _gone(self, event: Mapping[str, Any]) -> None:
        self._workers.pop(str(event["hostname"]), None)


# --- The program


class Exporter(Collector):
    """Serves the metrics until it is left; at every path, for prometheus_client's server knows no other page."""

    def __init__(self, app: TidemarkApp, address: str, port: int) -> None:
        self._address = address
        self._broker = Broker(app)
        reads: dict[str, Callable[[], Iterable[Metric]]] = {"postgres": partial(read_postgres, app)}
        reads["broker"] = self._broker
        if app.redis_url is not None:
            redis = RedisAddress.parse(app.redis_url).client(seconds=_REDIS_SECONDS)
            shards = app.settings.shards
            reads["redis"] = lambda: worker_metrics(read(redis)) + lease_metrics(redis, shards)
        self._sources = [Source(name, read, seconds=app.settings.metrics_seconds) for name, read in reads.items()]
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except (OSError, OverflowError) as error:
            raise TidemarkError(f"cannot listen on {address} port {port}: {error}") from None
        self.port = int(self._server.server_port)
        self._broker.start()

    def collect(self) -> Iterator[Metric]:
        """Read the sources side by side: those that hang cost one time-out together."""
        until = time.monotonic() + _ANSWER_SECONDS
        for source in self._sources:
            source.ask()
        readings = {source.name: source.reading(until) for source in self._sources}
        yield _gauge("build_info", "Version of the exporter.", {version("tidemark-sequencer"): 1}, "version")
        up = {name: reading.error is None for name, reading in readings.items()}
        yield _gauge("exporter_source_up", "Whether a source answered when it was last asked.", up, "source")
        seconds = {name: reading.seconds for name, reading in readings.items()}
        yield _gauge("exporter_source_duration_seconds", "Time it took to read a source.", seconds, "source")
        for reading in readings.values():
            yield from reading.metrics

    @property
    def url(self) -> str:
        host = f"[{self._address}]" if ":" in self._address else self._address
        return f"http://{host}:{self.port}/"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._broker.close()

    def answers(self) -> bool:
        """Whether a request of our own is answered: for the one page that asks no source."""
        connection = http.client.HTTPConnection(self._address or "127.0.0.1", self.port, timeout=3)
        with closing(connection), suppress(OSError):
            connection.request("GET", "/favicon.ico")
            return connection.getresponse().status == http.client.OK
        return False
