"""Figures from the workers: counters and histogram buckets in one Redis hash, for the exporter to show.

A worker process adds up what a task did and sends it when the task ends, in one round trip. The figures live in Redis,
so they outlast workers and exporter, and start over (as Prometheus' counters may) when Redis is emptied. A hint like
everything there: while Redis is away a process goes on adding up, and sends it all later; no task fails for it. An
answer that is lost may count a task twice.

How much is kept is bounded: topics get series of their own up to a limit, first come first served, and share
`OTHER` beyond it; every other label comes from a fixed set.
"""

import logging
import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from time import monotonic, perf_counter, time
from typing import TYPE_CHECKING, Any

from celery import signals
from redis import Redis, RedisError

from config.errors import TidemarkError
from db.materialize import RUN_BYTES, MaterializationMetrics
from db.translate import TRANSIENT

if TYPE_CHECKING:
    from tasks.app import TidemarkApp

log = logging.getLogger(__name__)

KEY = "tidemark:figures"
TOPICS_KEY = "tidemark:figures:topics"
# Partitions that cannot be materialized, by name: when that was found last, and why.
STUCK_KEY = "tidemark:stuck"
# No topic can be called so: neither has a legal name.
OTHER = "(other)"
SEVERAL = "(several)"

# Upper bounds in seconds: from an empty transaction to the time limits.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Redis adds integers exactly; so times are kept in microseconds.
MICROSECONDS = 1_000_000

# One command: all of it or nothing, at half the cost in the worker of a pipeline. The first ARGV[1] pairs are added.
_SEND = """
for i = 2, #ARGV, 2 do
    if i <= 2 * ARGV[1] then
        redis.call('HINCRBY', KEYS[1], ARGV[i], ARGV[i + 1])
    else
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
    end
end
"""

_PAUSE_SECONDS = 10.0
_REFUSED_SECONDS = 60.0
# What is kept of partitions that are stuck: so many of a task, so much of the reason, so long after the last of them.
_STUCK = 20
_WHY = 300
_STUCK_SECONDS = 3600
_KINDS = frozenset(
    {"OperationalError", "InterfaceError"}
    | {kind.__name__ for kind in TRANSIENT}
    | {kind.__name__ for kind in TidemarkError.__subclasses__()}
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A metric whose values are in Redis: `name` without Tidemark's prefix and without `_total`."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    histogram: bool = False
    # Kept in microseconds, shown in seconds.
    time: bool = False


_BY_TOPIC = ("topic", "strategy")

FAMILIES = (
    Family(
        name="materialize_duration_seconds",
        help="Time of a materializing transaction, lock wait included. Topic (several) where it served more than one.",
        labels=_BY_TOPIC,
        histogram=True,
        time=True,
    ),
    Family(
        name="materialize_lock_wait_seconds",
        help="Part of a materializing transaction spent on getting its partitions' locks.",
        labels=_BY_TOPIC,
        histogram=True,
        time=True,
    ),
    Family(name="materialize_events", help="Events that got their offset.", labels=_BY_TOPIC),
    Family(name="materialize_records", help="Records in those events.", labels=_BY_TOPIC),
    Family(name="materialize_log_bytes", help="Bytes of those events in object storage.", labels=_BY_TOPIC),
    Family(
        name="materialize_transaction_bytes",
        help="Bytes that materializing transactions added to runs and its index, estimated by rows.",
        labels=_BY_TOPIC,
    ),
    Family(
        name="materialize_batch_events",
        help="Events that these transactions would have taken at most; by their number, the size of a batch.",
        labels=_BY_TOPIC,
    ),
    Family(name="materialize_attempts", help="Materializing transactions tried, failed ones included."),
    Family(
        name="materialize_errors",
        help="Materializing transactions that failed, by error; most are repeated at once.",
        labels=("kind",),
    ),
    Family(
        name="materialize_stuck", help="Partitions that a task could not materialize; the others of it were served."
    ),
    Family(name="task_runs", help="Tasks that ended, by outcome.", labels=("task", "outcome")),
    Family(name="task_seconds", help="Time tasks ran.", labels=("task",), time=True),
    Family(name="fan_out_commits", help="Commits that fan-out found."),
    Family(name="fan_out_tasks", help="Materialize tasks published by what found the work.", labels=("by",)),
    Family(name="sweep_partitions", help="Partitions with pending events that the sweep met."),
    Family(name="retention_batches", help="Batches that retention deleted."),
    Family(name="retention_log_bytes", help="Their bytes in object storage."),
    Family(name="audit_violations", help="Broken invariants that tasks.audit met."),
    Family(name="pool_requests", help="Requests for a database connection in worker processes."),
    Family(name="pool_requests_queued", help="Those of them that had to wait."),
    Family(name="pool_requests_failed", help="Those of them that ended without a connection."),
    Family(name="pool_wait_seconds", help="Time they waited.", time=True),
    Family(name="pool_connections_opened", help="Attempts of worker processes to connect to the database."),
    Family(name="pool_connections_failed", help="Those of them that failed."),
    Family(name="pool_connections_lost", help="Database connections that broke."),
)

_POOL = {
    "requests_num": ("pool_requests", 1),
    "requests_queued": ("pool_requests_queued", 1),
    "requests_errors": ("pool_requests_failed", 1),
    "requests_wait_ms": ("pool_wait_seconds", 1000),
    "connections_num": ("pool_connections_opened", 1),
    "connections_errors": ("pool_connections_failed", 1),
    "connections_lost": ("pool_connections_lost", 1),
}


class WorkerFigures:
    """What this process did since it last told Redis. May be used by several threads; a forked child starts empty."""

    def __init__(self, redis: "Callable[[], Redis | None]", *, topics: int) -> None:
        self._redis = redis
        self._topics = topics
        self._start_over()

    def _start_over(self) -> None:
        self._pid = os.getpid()
        self._lock = Lock()
        self._added: dict[tuple[str, ...], int] = defaultdict(int)
        self._set: dict[str, float] = {}
        self._stuck: dict[str, str] = {}
        self._admitted: set[str] = {SEVERAL, OTHER}
        self._refused: dict[str, float] = {}
        self._silent_until = 0.0

    def add(self, name: str, *labels: str, amount: int = 1) -> None:
        """Count something; `amount` of times in microseconds."""
        if amount:
            with self._mine():
                self._added[name, *labels] += amount

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        """One more observation in a histogram."""
        bucket = str(bisect_left(BUCKETS, seconds))
        with self._mine():
            self._added[name, *labels, bucket] += 1
            self._added[name, *labels, "sum"] += round(seconds * MICROSECONDS)

    def keep(self, name: str, value: float) -> None:
        """Set a value instead of adding to it."""
        with self._mine():
            self._set[name] = value

    def materialized(
        self, done: MaterializationMetrics, topics: Iterable[str], topic_of: Callable[[int], str | None]
    ) -> None:
        """Count a transaction that served `topics`: what was placed for each, its time for all together."""
        first, *others = topics or (OTHER,)
        labels = (SEVERAL if others else first, done.strategy)
        self.observe("materialize_duration_seconds", done.processing_time_ms / 1000, *labels)
        self.observe("materialize_lock_wait_seconds", done.lock_wait_time_ms / 1000, *labels)
        self.add("materialize_batch_events", *labels, amount=done.batch_events)
        for moved in done.moved:
            own = (topic_of(moved.partition_id) or OTHER, done.strategy)
            self.add("materialize_events", *own, amount=moved.events)
            self.add("materialize_records", *own, amount=moved.records)
            self.add("materialize_log_bytes", *own, amount=moved.log_bytes)
            self.add("materialize_transaction_bytes", *own, amount=moved.runs * RUN_BYTES)
        self.add("materialize_attempts")

    def failed(self, error: BaseException) -> None:
        """Count a transaction that failed."""
        kind = type(error).__name__
        self.add("materialize_attempts")
        self.add("materialize_errors", kind if kind in _KINDS else "other")

    def stuck(self, ids: Sequence[int], error: BaseException, describe: Callable[[Sequence[int]], str]) -> None:
        """Report partitions that cannot be materialized by name: in the log, as a metric, and for `status`."""
        why = f"{type(error).__name__}: {str(error).strip()}"
        log.error(
            "partitions cannot be materialized",
            extra={"partitions": describe(ids), "error": why, "next": "each sweep tries again"},
        )
        self.add("materialize_stuck", amount=len(ids))
        with self._mine():
            self._stuck.update({describe([i]): f"{time():.0f} {why[:_WHY]}" for i in ids[:_STUCK]})

    def flush(self) -> None:
        """Send what was added up; keeps it for the next time when Redis does not take it."""
        redis = self._redis()
        with self._mine():
            if not (self._added or self._set or self._stuck) or monotonic() < self._silent_until:
                return
            added, self._added = self._added, defaultdict(int)
            values, self._set = self._set, {}
            stuck, self._stuck = self._stuck, {}
        if redis is None:
            return
        try:
            admitted = self._admit(redis, {labels[1] for labels in added if _has_topic(labels)})
            shared = _shared(added, admitted)
            arguments: list[str | int] = [len(shared)]
            for labels, amount in shared.items():
                arguments += ["|".join(labels), amount]
            for name, value in values.items():
                arguments += [name, str(value)]
            redis.eval(_SEND, 1, KEY, *arguments)
            if stuck:
                redis.hset(STUCK_KEY, mapping=dict[Any, Any](stuck))
                redis.expire(STUCK_KEY, _STUCK_SECONDS)
        except RedisError as error:
            log.warning("figures are kept until Redis is back", extra={"error": str(error)})
            with self._mine():
                self._silent_until = monotonic() + _PAUSE_SECONDS
                for labels, amount in added.items():
                    self._added[labels] += amount
                self._set = {**values, **self._set}
                self._stuck = {**stuck, **self._stuck}

    def _admit(self, redis: "Redis", topics: set[str]) -> set[str]:
        """Topics with series of their own. Asks Redis about new ones; two who ask at once may admit one too many."""
        now = monotonic()
        unknown = [t for t in topics - self._admitted if self._refused.get(t, 0.0) <= now]
        if unknown:
            with redis.pipeline(transaction=False) as pipeline:
                pipeline.scard(TOPICS_KEY)
                pipeline.smismember(TOPICS_KEY, unknown)
                count, known = pipeline.execute()
            fresh = [t for t, is_known in zip(unknown, known, strict=True) if not is_known]
            admitted = fresh[: max(0, self._topics - count)]
            if admitted:
                redis.sadd(TOPICS_KEY, *admitted)
            refused = set(fresh[len(admitted) :])
            if len(self._refused) + len(refused) > 10 * self._topics:
                self._refused.clear()
            self._refused.update(dict.fromkeys(refused, now + _REFUSED_SECONDS))
            self._admitted.update(set(unknown) - refused)
        return self._admitted

    def _mine(self) -> Lock:
        # A forked child must neither send its parent's figures again nor wait for a lock its parent held.
        if self._pid != os.getpid():
            self._start_over()
        return self._lock


def _has_topic(labels: tuple[str, ...]) -> bool:
    return labels[0] in _TOPIC_FAMILIES


def _shared(added: Mapping[tuple[str, ...], int], admitted: set[str]) -> Mapping[tuple[str, ...], int]:
    """The same with `OTHER` in place of topics that are not admitted."""
    if all(labels[1] in admitted for labels in added if _has_topic(labels)):
        return added
    together: dict[tuple[str, ...], int] = defaultdict(int)
    for labels, amount in added.items():
        own = not _has_topic(labels) or labels[1] in admitted
        together[labels if own else (labels[0], OTHER, *labels[2:])] += amount
    return together


_TOPIC_FAMILIES = frozenset(family.name for family in FAMILIES if "topic" in family.labels)


def connect(app: "TidemarkApp") -> None:
    """Count every task of ours when it ends, and send the process's figures then."""
    started: dict[str, float] = {}

    def task_prerun(task_id: str, **_: Any) -> None:
        started[task_id] = perf_counter()

    def task_postrun(task_id: str, task: Any, retval: Any = None, state: str | None = None, **_: Any) -> None:
        began = started.pop(task_id, None)
        if task.app is not app or app.redis is None or not task.name.startswith("tasks."):
            return
        figures = app.figures
        # None: the task asked not to be reported, as one does that is put back.
        figures.add("task_runs", task.name, (state or "ignored").lower())
        if began is not None:
            figures.add("task_seconds", task.name, amount=round((perf_counter() - began) * MICROSECONDS))
        if state == "SUCCESS" and isinstance(retval, dict):
            _count_result(figures, task.name, retval)
        if "database" in vars(app):
            for name, value in app.database.pool.pop_stats().items():
                if name in _POOL:
                    ours, scale = _POOL[name]
                    figures.add(ours, amount=value * scale)
        figures.flush()

    # Strong references: the functions live nowhere else.
    signals.task_prerun.connect(task_prerun, weak=False)
    signals.task_postrun.connect(task_postrun, weak=False)


def _count_result(figures: WorkerFigures, task: str, result: Mapping[str, Any]) -> None:
    if task == "tasks.fan_out":
        figures.add("fan_out_commits", amount=_number(result, "commits"))
        figures.add("fan_out_tasks", "fan_out", amount=_number(result, "tasks"))
    elif task == "tasks.sweep":
        figures.add("sweep_partitions", amount=_number(result, "partitions"))
        figures.add("fan_out_tasks", "sweep", amount=_number(result, "tasks"))
    elif task == "tasks.retain":
        figures.add("retention_batches", amount=_number(result, "deleted"))
        figures.add("retention_log_bytes", amount=_number(result, "log_bytes"))
    elif task == "tasks.audit":
        violations = _number(result, "violations")
        figures.add("audit_violations", amount=violations)
        figures.keep("audit_last_violations", violations)
        figures.keep("audit_last_timestamp_seconds", time())


def _number(result: Mapping[str, Any], name: str) -> int:
    value = result.get(name, 0)
    return len(value) if isinstance(value, list | tuple) else int(value or 0)


def read(redis: "Redis") -> dict[str, str]:
    """All figures as they stand in Redis."""
    found: Any = redis.hgetall(KEY)
    return dict(found)


def read_stuck(redis: "Redis", *, seconds: float) -> dict[str, str]:
    """Why partitions could not be materialized within the last `seconds`, by name."""
    found: Any = redis.hgetall(STUCK_KEY)
    entries = {name: value.partition(" ") for name, value in found.items()}
    return {name: why for name, (at, _, why) in sorted(entries.items()) if float(at) >= time() - seconds}
