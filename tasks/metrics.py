"""What the workers count: sums and histogram buckets in one Redis hash, which the exporter shows to Prometheus.

A worker process adds up what a task did and sends it when the task ends, in one round trip. The sums live in Redis, so
they outlast workers and exporter, and begin at 0 (as Prometheus' counters may) when Redis is emptied. They are a hint
like everything there: while Redis is away a process goes on adding up, and sends it all later. No task fails for it.
An answer that is lost may count a task twice.

How much is kept is bounded: topics get series of their own up to a limit, first come first served, and share `OTHER`
beyond it. Every other label comes from a fixed set.
"""

import os
from bisect import bisect_left
from collections import Counter, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from time import time
from typing import Any, Literal, NamedTuple

from redis import Redis

from tasks.app import TidemarkApp
from tasks.hints import Hints

KEY = "tidemark:metrics"
TOPICS_KEY = "tidemark:metrics:topics"
# Partitions that cannot be materialized, by name: when that was found last, and why.
STUCK_KEY = "tidemark:stuck"
# No topic can be called so: neither is a legal name.
OTHER = "(other)"
SEVERAL = "(several)"

# Upper bounds in seconds: from an empty transaction to the time limits.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Redis adds integers exactly, so times are kept in microseconds.
MICROSECONDS = 1_000_000

# All sums in one command, so all of them or none arrive. KEYS: the hash, and the topics with series of their own.
# ARGV: how many such topics there may be; then of each sum what stands before its topic, the topic (or nothing), what
# stands behind it, and the amount.
_SEND = """
for i = 2, #ARGV, 4 do
    local topic = ARGV[i + 1]
    if topic ~= '' and redis.call('SISMEMBER', KEYS[2], topic) == 0 then
        if redis.call('SCARD', KEYS[2]) < tonumber(ARGV[1]) then
            redis.call('SADD', KEYS[2], topic)
        else
            topic = '(other)'
        end
    end
    redis.call('HINCRBY', KEYS[1], ARGV[i] .. topic .. ARGV[i + 2], ARGV[i + 3])
end
"""

# Samples of a kind, of all workers together; a process that cannot send keeps no more of them either.
SAMPLES = 5_000
_STUCK_SECONDS = 3600


class Family(NamedTuple):
    """A metric whose values are in Redis: `name` without Tidemark's prefix and without `_total`."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    kind: Literal["counter", "gauge", "histogram"] = "counter"
    # Kept in microseconds, shown in seconds.
    time: bool = False


_BY_TOPIC = ("topic", "strategy")

FAMILIES = (
    # Of a transaction that served several topics the topic is SEVERAL.
    Family("materialize_duration_seconds", "Time of a transaction, lock wait included.", _BY_TOPIC, "histogram"),
    Family("materialize_lock_wait_seconds", "Its part spent on getting locks.", _BY_TOPIC, "histogram"),
    Family("commit_to_offset_seconds", "Wait of an event for its offset, sampled.", ("topic",), "histogram"),
    Family("materialize_events", "Events that got their offset.", _BY_TOPIC),
    Family("materialize_records", "Records in those events.", _BY_TOPIC),
    Family("materialize_log_bytes", "Bytes of those events in object storage.", _BY_TOPIC),
    Family("materialize_transaction_bytes", "Bytes added to runs and its index, estimated by rows.", _BY_TOPIC),
    Family("materialize_batch_events", "Events that transactions would have taken at most.", _BY_TOPIC),
    Family("materialize_attempts", "Materializing transactions tried, failed ones included."),
    Family("materialize_errors", "Transactions that failed, by error; most are repeated at once.", ("kind",)),
    Family("materialize_stuck", "Partitions that a task could not materialize; the others of it were served."),
    Family("task_runs", "Tasks that ended, by outcome.", ("task", "outcome")),
    Family("task_seconds", "Time tasks ran.", ("task",), time=True),
    Family("task_last_success_timestamp_seconds", "When a task last ended well.", ("task",), "gauge"),
    Family(
        "messages_refused",
        "Messages that workers did not take: nobody of ours publishes such.",
        ("reason",),
    ),
    Family("fan_out_commits", "Commits that fan-out found."),
    Family("fan_out_tasks", "Materialize tasks published by what found the work.", ("by",)),
    Family("sweep_partitions", "Partitions with pending events that the sweep met."),
    Family("retention_batches", "Batches that retention deleted."),
    Family("retention_log_bytes", "Their bytes in object storage."),
    Family("producers_expired", "Idempotent producers that partitions forgot, because they were silent for long."),
    Family("purge_batches", "Batches of deleted topics that were purged."),
    Family("collect_objects", "Uploads that tasks.collect deleted from the object store."),
    Family("collect_failures", "Uploads that it could not delete; it tries them again."),
    Family("reconcile_objects", "Keys in the store that tasks.reconcile compared."),
    Family("reconcile_condemned", "Uploads that it condemned: nobody has committed them."),
    Family("reconcile_missing", "Committed objects that it did not find in the store, counted once a round."),
    Family("audit_violations", "Broken invariants that tasks.audit met."),
    Family("audit_last_violations", "Broken invariants that the last run of tasks.audit met.", kind="gauge"),
    Family("audit_last_timestamp_seconds", "When that was, in seconds since the epoch.", kind="gauge"),
    Family("pool_requests", "Requests for a database connection in worker processes."),
    Family("pool_requests_queued", "Those of them that had to wait."),
    Family("pool_requests_failed", "Those of them that ended without a connection."),
    Family("pool_wait_seconds", "Time they waited.", time=True),
    Family("pool_connections_opened", "Attempts of worker processes to connect to the database."),
    Family("pool_connections_failed", "Those of them that failed."),
    Family("pool_connections_lost", "Database connections that broke."),
)
_TOPIC_FAMILIES = frozenset(family.name for family in FAMILIES if "topic" in family.labels)

# What psycopg_pool counts, as ours, and in how many of our units.
_POOL = {
    "requests_num": ("pool_requests", 1),
    "requests_queued": ("pool_requests_queued", 1),
    "requests_errors": ("pool_requests_failed", 1),
    "requests_wait_ms": ("pool_wait_seconds", 1000),
    "connections_num": ("pool_connections_opened", 1),
    "connections_errors": ("pool_connections_failed", 1),
    "connections_lost": ("pool_connections_lost", 1),
}
# What a task's result says, as ours.
_RESULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "tasks.fan_out": {"commits": ("fan_out_commits",), "tasks": ("fan_out_tasks", "fan_out")},
    "tasks.sweep": {"partitions": ("sweep_partitions",), "tasks": ("fan_out_tasks", "sweep")},
    "tasks.retain": {
        "deleted": ("retention_batches",),
        "log_bytes": ("retention_log_bytes",),
        "producers_expired": ("producers_expired",),
    },
    "tasks.purge": {"deleted": ("purge_batches",)},
    "tasks.audit": {"violations": ("audit_violations",)},
    "tasks.collect": {"deleted": ("collect_objects",), "failed": ("collect_failures",)},
    "tasks.reconcile": {
        "compared": ("reconcile_objects",),
        "condemned": ("reconcile_condemned",),
        "missing": ("reconcile_missing",),
    },
}


@dataclass(slots=True)
class _Unsent:
    added: Counter[tuple[str, ...]] = field(default_factory=Counter)
    # By the hash they are for.
    kept: defaultdict[str, dict[str, str]] = field(default_factory=lambda: defaultdict(dict))
    samples: defaultdict[str, deque[str]] = field(default_factory=lambda: defaultdict(lambda: deque(maxlen=SAMPLES)))

    def merge(self, later: "_Unsent") -> None:
        self.added.update(later.added)
        for key, values in later.kept.items():
            self.kept[key] |= values
        for key, samples in later.samples.items():
            self.samples[key].extend(samples)


class WorkerMetrics:
    """What this process did since it last told Redis. May be used by several threads; a forked child starts empty."""

    def __init__(self, app: TidemarkApp) -> None:
        self._hints = app.once(Hints)
        self._topics = app.settings.metrics_topics
        self._start_empty()

    def _start_empty(self) -> None:
        self._pid = os.getpid()
        self._lock = Lock()
        self._unsent = _Unsent()

    def add(self, name: str, *labels: str, amount: int = 1) -> None:
        """Count something; `amount` of times in microseconds."""
        if amount:
            with self._mine():
                self._unsent.added[name, *labels] += amount

    def observe(self, name: str, seconds: float, *labels: str) -> None:
        bucket = str(bisect_left(BUCKETS, seconds))
        with self._mine():
            self._unsent.added[name, *labels, bucket] += 1
            self._unsent.added[name, *labels, "sum"] += round(seconds * MICROSECONDS)

    def keep(self, values: Mapping[str, object], key: str = KEY) -> None:
        """Set values of a hash in Redis."""
        with self._mine():
            self._unsent.kept[key].update({name: str(value) for name, value in values.items()})

    def sample(self, key: str, value: str) -> None:
        """Append to a list in Redis, which keeps the newest `SAMPLES` of all workers."""
        with self._mine():
            self._unsent.samples[key].append(value)

    def task_ended(self, name: str, state: str, seconds: float, retval: object) -> None:
        self.add("task_runs", name, state.lower())
        self.add("task_seconds", name, amount=round(seconds * MICROSECONDS))
        if state != "SUCCESS":
            return
        self.keep({f"task_last_success_timestamp_seconds|{name}": time()})
        if isinstance(retval, Mapping):
            for field_name, labels in _RESULTS.get(name, {}).items():
                self.add(*labels, amount=int(retval.get(field_name) or 0))
            if name == "tasks.audit":
                violations = int(retval.get("violations") or 0)
                self.keep({"audit_last_violations": violations, "audit_last_timestamp_seconds": time()})

    def pool_used(self, stats: Mapping[str, int]) -> None:
        """Count what a connection pool did, by its `pop_stats`."""
        for name, (ours, scale) in _POOL.items():
            self.add(ours, amount=stats.get(name, 0) * scale)

    def flush(self) -> None:
        """Send what was added up, or keep it for the next time where Redis does not take it."""
        with self._mine():
            unsent, self._unsent = self._unsent, _Unsent()
        if unsent != _Unsent() and not self._hints.ask(lambda redis: self._send(redis, unsent), otherwise=False):
            with self._mine():
                unsent.merge(self._unsent)
                self._unsent = unsent

    def _send(self, redis: Redis, unsent: _Unsent) -> bool:
        sums: list[str | int] = []
        for (name, *labels), amount in unsent.added.items():
            if name in _TOPIC_FAMILIES and labels[0] not in {OTHER, SEVERAL}:
                sums += [f"{name}|", labels[0], "|".join(["", *labels[1:]]), amount]
            else:
                sums += ["|".join([name, *labels]), "", "", amount]
        with redis.pipeline() as pipeline:
            pipeline.eval(_SEND, 2, KEY, TOPICS_KEY, self._topics, *sums)
            for key, values in unsent.kept.items():
                pipeline.hset(key, mapping=dict[Any, Any](values))
            if STUCK_KEY in unsent.kept:
                pipeline.expire(STUCK_KEY, _STUCK_SECONDS)
            for key, samples in unsent.samples.items():
                pipeline.rpush(key, *samples)
                pipeline.ltrim(key, -SAMPLES, -1)
            pipeline.execute()
        return True

    def _mine(self) -> Lock:
        # A forked child must neither send its parent's sums a second time nor wait for a lock its parent held.
        if self._pid != os.getpid():
            self._start_empty()
        return self._lock


def read(redis: Redis) -> dict[str, str]:
    found: Any = redis.hgetall(KEY)
    return dict(found)


def read_stuck(redis: Redis, *, seconds: float) -> dict[str, str]:
    """Why partitions could not be materialized within the last `seconds`, by name."""
    found: Any = redis.hgetall(STUCK_KEY)
    entries = {name: value.partition(" ") for name, value in found.items()}
    return {name: why for name, (at, _, why) in sorted(entries.items()) if float(at) >= time() - seconds}
