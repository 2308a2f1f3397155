"""All of Tidemark's settings: one frozen, validated object read from `TIDEMARK_…` environment variables.

`docs/settings.md` is generated from the fields, by `make docs`.
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, Json, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from config.errors import SettingsError
from config.redis import SCHEMES, RedisAddress, is_redis

# The ways to calculate offsets. All give the same ones; they differ in speed. Each is a statement of its own,
# `place_<name>`, with the same parameters and the same result. `window`: a running sum over each partition's pending
# events. `incremental`: one run after the other, by recursion.
Strategy = Literal["window", "incremental"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
# The faster one on deep and on thin backlogs: `python -m tests.benchmarks --only claims`.
DEFAULT_STRATEGY: Strategy = "incremental"

# The ways to cut a backlog into transactions. The offsets are the same; speed, latency and lock times are not.
Batching = Literal["adaptive", "complete", "fixed", "collect"]
BATCHINGS: tuple[Batching, ...] = get_args(Batching)

# At least a millisecond: less would reach Postgres as 0, which means no limit.
Seconds = Annotated[float, Field(ge=0.001, le=30 * 86_400, allow_inf_nan=False)]
_BROKER_SCHEMES = (*SCHEMES, "amqp", "amqps", "pyamqp")
# Characters of a wrong value.
_SHOWN = 100
_POSTGRES_SCHEMES = ("postgresql", "postgres")


class Settings(BaseSettings):
    """Read once at start; immutable afterwards. The text below each field is its row of `docs/settings.md`."""

    model_config = SettingsConfigDict(env_prefix="TIDEMARK_", frozen=True, extra="ignore")

    database_url: str | None = Field(None, repr=False)
    """Postgres, as `postgresql://user:password@host:port/database`.
    Without it an embedded PostgreSQL 18 runs in the data directory."""
    broker_url: str | None = Field(None, repr=False)
    """Celery's broker, as `redis://…` or `amqp://…`. Without it an embedded Redis runs in the data directory."""
    redis_url: str | None = Field(None, repr=False)
    """Redis for task results, marks of queued partitions, shard leases and metrics. The default is the broker, if
    that is a Redis. With RabbitMQ and without this variable, none of these is kept."""
    # Root's home is closed to the user that its embedded Postgres runs as.
    data_dir: Path = Field(
        default_factory=lambda: platformdirs.user_state_path("tidemark") if os.geteuid() else Path("/var/lib/tidemark")
    )
    """Directory of the embedded servers, the heartbeat files and Flower's generated password."""

    shards: int = Field(8, ge=1, le=1024)
    """Number of shard queues (`materialize.<n>`). It must be the same in every process."""
    events_per_partition: int = Field(20_000, ge=1, le=1_000_000)
    """With `fixed` and `collect` batching, a transaction materializes at most this many events of each partition."""
    events_per_task: int = Field(50_000, ge=1, le=10_000_000)
    """Partitions share a task up to this many pending events. A partition with more gets a task of its own."""
    partitions_per_task: int = Field(2_000, ge=1, le=10_000)
    """At most this many partitions share a task, and so a transaction."""
    strategy: Strategy = DEFAULT_STRATEGY
    """How offsets are calculated: `window` or `incremental`. Only their speed differs; see docs/benchmarks.md."""
    candidate: Strategy | None = None
    """Strategy to try on `TIDEMARK_CANDIDATE_PERCENT` of the partitions; `celery -A tasks compare` shows both sides."""
    candidate_percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    """Percentage of partitions that use `TIDEMARK_CANDIDATE`, to two decimals. Growing it keeps those chosen before."""
    # Holds its time where `fixed` is only right for one machine: `python -m tests.benchmarks.batching`.
    batching: Batching = "adaptive"
    """How many events a transaction takes. `adaptive`: as many as fit into `TIDEMARK_BATCH_SECONDS`. `complete`: all of
    a partition, one partition after the other. `fixed`: at most `TIDEMARK_EVENTS_PER_PARTITION` of each partition.
    `collect`: like `fixed`, after waiting `TIDEMARK_COLLECT_SECONDS` for more commits."""
    batch_seconds: Annotated[float, Field(ge=0.005, le=10, allow_inf_nan=False)] = 0.2
    """`adaptive` batching aims at transactions of this length. A transaction locks its partitions while it runs."""
    batch_events_min: int = Field(1_000, ge=1, le=1_000_000)
    """`adaptive` batching plans at least this many events for a transaction."""
    batch_events_max: int = Field(100_000, ge=1, le=10_000_000)
    """`adaptive` and `complete` batching plan at most this many events for a transaction, but at least one of each
    partition in it."""
    collect_seconds: Annotated[float, Field(ge=0.001, le=30, allow_inf_nan=False)] = 0.1
    """`collect` batching materializes this long after a wake-up, which adds the same time to the latency. Commits that
    the fan-out finds do not wait again: they were collected during its interval."""
    task_seconds: Seconds = 5
    """A task that still has backlog after this time hands it over to a new task."""

    fan_out_interval: Seconds = 0.5
    """Beat looks for new commits at this interval. It bounds the latency of commits that nobody announced."""
    sweep_interval: Seconds = 30
    """Every partition is probed at this interval, to find what a lost message left behind."""
    retention_interval: Seconds = 60
    """The retention limits of topics are applied, and deleted topics purged, at this interval."""
    audit_interval: Seconds = 600
    """The invariants are checked on a part of the log at this interval."""
    maintenance_seconds: Seconds = 5
    """A retention, audit, collect or reconcile task stops after this time and continues at its next run."""
    delete_batch: int = Field(5_000, ge=1, le=1_000_000)
    """Retention deletes at most this many batches in one transaction."""
    # Kafka's default for producers without transactions.
    producer_seconds: Seconds = 86_400
    """An idempotent producer that has been silent for this long is forgotten. It starts over with a new id or epoch."""
    default_partitions: int = Field(1, ge=1, le=100_000)
    """`topics create` makes this many partitions when it is not told how many."""
    default_retention_seconds: Annotated[float, Field(ge=0, le=3e11, allow_inf_nan=False)] | None = None
    """`topics create` gives a topic this retention time when it is not told one. Without it batches are kept."""
    default_retention_bytes: int | None = Field(None, ge=0, le=2**63 - 1)
    """`topics create` gives a topic this retention size by partition when it is not told one. Without it there is no
    limit."""

    object_store: str | None = None
    """Where the brokers upload to, as `file:///directory` or `s3://bucket/prefix`: the keys of objects are relative to
    it, and nothing else may be kept there. Without it nothing is deleted from storage. It needs the extra `store`."""
    object_store_options: Json[dict[str, Any]] | None = Field(None, repr=False)
    """Options of s3fs as JSON, such as `{"endpoint_url": "https://…", "key": "…", "secret": "…"}`. Without them the
    credentials are those that boto finds."""
    # Short, for a turn is: ten brokers that upload twenty objects a second are to be kept up with.
    collect_interval: Seconds = 10
    """With an object store, uploads that no batch refers to are deleted at this interval."""
    reconcile_interval: Seconds = 300
    """With an object store, a part of its keys is compared with the table at this interval."""
    object_grace_seconds: Seconds = 3600
    """An upload is deleted this long after its last batch, or after it was condemned. It must be longer than a reader
    holds a batch that it has fetched, than a broker repeats a commit, and than a standby may lag that is promoted."""
    object_ttl_seconds: Seconds = 86_400
    """An upload that is older and that nobody has committed is condemned. It must be longer than a broker takes from
    the beginning of an upload to its commit, repetitions included."""
    queued_seconds: Seconds = 60
    """A partition counts as queued for at most this long. After that it may be queued a second time."""

    pool_open: int = Field(25, ge=1, le=1000)
    """A process has at most this many database connections."""
    pool_idle: int = Field(10, ge=0, le=1000)
    """A process keeps at most this many idle database connections, and never more than it has threads for."""
    pool_lifetime: Seconds = 3600
    """A database connection is replaced after this time."""
    pool_wait: Seconds = 10
    """Waiting for a free database connection fails after this time."""

    lock_timeout: Seconds = 1
    """Postgres gives up waiting for a lock after this time. A task waits for locked partitions once, at its end."""
    statement_timeout: Seconds = 60
    """Postgres cancels a statement after this time."""
    transaction_timeout: Seconds = 120
    """Postgres (17 and later) ends a transaction after this time."""
    retries: int = Field(4, ge=0, le=20)
    """After a transient database error, a task repeats a transaction at most this many times."""
    retry_seconds: Seconds = 0.02
    """Pause before a transaction is repeated for the first time. It doubles each time, with jitter, up to 5 s."""

    lease_seconds: Annotated[float, Field(ge=2, le=3600)] = 15
    """Workers without `-Q` share the shards among themselves. When a worker dies, others take its shards over within
    this time."""
    visibility_timeout: int = Field(300, ge=10)
    """Redis gives a task to a second worker when the first has not finished it after this time. It must be at least
    twice a task's time limit: the longer of task seconds and maintenance seconds, plus pool wait, lock timeout,
    statement timeout and 10 s."""
    flower_auth: str | None = Field(None, repr=False, pattern=r"^[^:]+:.{8,}$")
    """Flower's login, as `user:password` with a password of 8 characters or more. Without it a password is generated
    and kept in the data directory."""
    metrics_topics: int = Field(200, ge=1, le=10_000)
    """At most this many topics, the oldest ones, have metrics of their own. All others are summed up as `(other)`."""
    metrics_seconds: Seconds = 5
    """The exporter reads Postgres, Redis and the broker at most once in this time, however often it is asked."""
    heartbeat_file: Path | None = None
    """File by which `celery -A tasks health` knows that this program lives. The default is `worker.heartbeat`,
    `beat.heartbeat` or `exporter.heartbeat` in the data directory, where all workers share one file."""
    tracing: bool = False
    """Trace commit, fan-out and materialize with OpenTelemetry. It needs the extra `tracing`; the `OTEL_…` variables
    say where spans go."""
    log_format: Literal["console", "json"] = "console"
    """Format of the log: `console` for people, `json` for machines. Both write one event a line."""

    @field_validator("database_url", "broker_url", "redis_url")
    @classmethod
    def _speaks_a_known_protocol(cls, value: str | None, info: ValidationInfo) -> str | None:
        known = {"database_url": _POSTGRES_SCHEMES, "broker_url": _BROKER_SCHEMES, "redis_url": SCHEMES}
        schemes = known[info.field_name or ""]
        if value is not None and urlsplit(value).scheme not in schemes:
            raise ValueError(f"must start with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        if value is not None:
            try:
                _ = urlsplit(value).port
            except ValueError:
                raise ValueError("its port is no number; encode / ? # @ : in a password") from None
        if value is not None and is_redis(value):
            RedisAddress.parse(value)
        return value

    @field_validator("object_store")
    @classmethod
    def _names_a_store(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"file:///[^/].*|s3://[^/@:?#]+(/.*)?", value):
            raise ValueError(
                "must be file:///directory or s3://bucket/prefix; credentials go into TIDEMARK_OBJECT_STORE_OPTIONS"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.lock_timeout > self.statement_timeout:
            raise ValueError(
                f"TIDEMARK_LOCK_TIMEOUT ({self.lock_timeout:g} s) is above TIDEMARK_STATEMENT_TIMEOUT "
                f"({self.statement_timeout:g} s), which would cancel the wait first"
            )
        if 2 * self.hard_time_limit > self.visibility_timeout:
            raise ValueError(
                f"TIDEMARK_VISIBILITY_TIMEOUT ({self.visibility_timeout} s) is less than twice a task's time limit "
                f"({self.hard_time_limit:g} s = task seconds + pool wait + lock timeout + statement timeout + 10): "
                f"Redis would hand a running task to a second worker"
            )
        if self.candidate is None and self.candidate_percent:
            raise ValueError("TIDEMARK_CANDIDATE_PERCENT needs TIDEMARK_CANDIDATE: a strategy to try")
        if self.candidate is not None and self.candidate_percent is None:
            raise ValueError("TIDEMARK_CANDIDATE needs TIDEMARK_CANDIDATE_PERCENT: its share of the partitions")
        if self.candidate == self.strategy:
            raise ValueError(f"TIDEMARK_CANDIDATE ({self.candidate}) is TIDEMARK_STRATEGY: nothing to compare")
        if self.batch_events_min > self.batch_events_max:
            raise ValueError(
                f"TIDEMARK_BATCH_EVENTS_MIN ({self.batch_events_min}) is above TIDEMARK_BATCH_EVENTS_MAX "
                f"({self.batch_events_max})"
            )
        if self.batching == "collect" and self.collect_seconds >= self.queued_seconds:
            raise ValueError(
                f"TIDEMARK_COLLECT_SECONDS ({self.collect_seconds:g} s) is not below TIDEMARK_QUEUED_SECONDS "
                f"({self.queued_seconds:g} s): a partition would be queued again while it still collects"
            )
        return self

    @property
    def hard_time_limit(self) -> float:
        """Seconds after which Celery kills a task: its own time, the last attempt begun in it, and a margin.

        An attempt may wait for a connection and for a lock, and then take as long as a statement may. Celery enforces
        the limit in a prefork pool only. Solo and threads pools have none: there the timeouts that are added up here
        end each attempt with an error, and no repetition begins after the task's time.
        """
        attempt = self.pool_wait + self.lock_timeout + self.statement_timeout
        return max(self.task_seconds, self.maintenance_seconds) + attempt + 10

    @property
    def overdue_seconds(self) -> float:
        """After this time two sweeps have dispatched an event, and its task had time to run: something holds it up."""
        return 2 * self.sweep_interval + self.hard_time_limit


def load_settings() -> Settings:
    """Read the environment; SettingsError names every variable that is wrong."""
    try:
        return Settings()
    except ValidationError as error:
        lines = []
        for item in error.errors():
            name = f"TIDEMARK_{item['loc'][0]}".upper() if item["loc"] else "settings"
            # A URL may hold a password, and a message may end up in a log.
            shown = repr(item["input"])
            # One may have been given to the wrong variable.
            is_secret = name.endswith(("_URL", "_AUTH", "_STORE", "_OPTIONS")) or "://" in shown
            shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"
            given = f" (given: {shown})" if item["loc"] and not is_secret else ""
            lines.append(f"{name}: {item['msg'].removeprefix('Value error, ')}{given}")
        raise SettingsError("; ".join(lines)) from None
