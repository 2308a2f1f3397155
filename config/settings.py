"""All of Tidemark's settings: one frozen, validated object read from `TIDEMARK_…` environment variables.

The field descriptions are the documentation; `docs/settings.md` is generated from them.
"""

import os
from pathlib import Path
from typing import Annotated, Literal, Self, get_args
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
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
# Holds its time where `fixed` is only right for one machine: `python -m tests.benchmarks.batching`.
DEFAULT_BATCHING: Batching = "adaptive"

# At least a millisecond: less would reach Postgres as 0, which means no limit.
Seconds = Annotated[float, Field(ge=0.001, le=30 * 86_400, allow_inf_nan=False)]
_BROKER_SCHEMES = (*SCHEMES, "amqp", "amqps", "pyamqp")
_POSTGRES_SCHEMES = ("postgresql", "postgres")


def _default_data_dir() -> Path:
    """A directory the servers' user can enter: root's home is closed to the user Postgres runs as."""
    if os.geteuid() == 0:
        return Path("/var/lib/tidemark")
    return platformdirs.user_state_path("tidemark")


class Settings(BaseSettings):
    """Read once at start; immutable afterwards."""

    model_config = SettingsConfigDict(env_prefix="TIDEMARK_", frozen=True, extra="ignore")

    database_url: str | None = Field(
        None,
        repr=False,
        description="Postgres, as `postgresql://user:password@host:port/database`. Without it an embedded "
        "PostgreSQL 18 runs in the data directory.",
    )
    broker_url: str | None = Field(
        None,
        repr=False,
        description="Celery's broker, as `redis://…` or `amqp://…`. Without it an embedded Redis runs in the "
        "data directory.",
    )
    redis_url: str | None = Field(
        None,
        repr=False,
        description="Redis for results, queued-tokens, shard leases and metrics. Defaults to the broker where that is "
        "a Redis; with RabbitMQ and without it none of these is kept.",
    )
    data_dir: Path = Field(
        default_factory=_default_data_dir,
        description="Where the embedded servers and beat keep their files.",
    )

    shards: int = Field(
        8,
        ge=1,
        le=1024,
        description="Number of shard queues `materialize.<n>`. Every process must be given the same number.",
    )
    events_per_partition: int = Field(
        20_000,
        ge=1,
        le=1_000_000,
        description="At most so many events of one partition are materialized in one transaction.",
    )
    events_per_task: int = Field(
        50_000,
        ge=1,
        le=10_000_000,
        description="Thin partitions share a task up to so many events in all; a partition with more travels alone.",
    )
    partitions_per_task: int = Field(
        2_000, ge=1, le=10_000, description="At most so many partitions share a task, and so a transaction."
    )
    strategy: Strategy = Field(
        DEFAULT_STRATEGY,
        description="How offsets are calculated: `window` or `incremental`. They are the same; see docs/benchmarks.md.",
    )
    candidate: Strategy | None = Field(
        None, description="A strategy to try on a share of the partitions; `celery -A tasks compare` shows both sides."
    )
    candidate_percent: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = Field(
        None, description="That share in percent, to two decimals. Growing it keeps the partitions chosen before."
    )
    batching: Batching = Field(
        DEFAULT_BATCHING,
        description="How many events a transaction takes. `adaptive`: as many as fit into the batch seconds. "
        "`complete`: partitions to their end, one after the other. `fixed`: the events per partition. `collect`: as "
        "`fixed`, after collecting commits for a while.",
    )
    batch_seconds: Annotated[float, Field(ge=0.005, le=10, allow_inf_nan=False)] = Field(
        0.2, description="`adaptive` aims at transactions of this length; they hold their partitions' locks as long."
    )
    batch_events_min: int = Field(1_000, ge=1, le=1_000_000, description="`adaptive` does not plan for fewer events.")
    batch_events_max: int = Field(
        100_000,
        ge=1,
        le=10_000_000,
        description="Nor for more; `complete` takes at most so many events in a transaction. Both take at least one of "
        "each partition.",
    )
    collect_seconds: Annotated[float, Field(ge=0.001, le=30, allow_inf_nan=False)] = Field(
        0.1,
        description="`collect` materializes this long after a wake-up, so adds as much to the latency. Commits found "
        "by the fan-out have been collected for its interval already.",
    )
    task_seconds: Seconds = Field(
        5, description="A task that still has backlog after this time hands over to a fresh one."
    )

    fan_out_interval: Seconds = Field(
        0.5,
        description="Beat looks for new commits this often; bounds the latency of commits nobody announced.",
    )
    sweep_interval: Seconds = Field(
        30, description="Every partition is probed this often, to find what a lost message left behind."
    )
    retention_interval: Seconds = Field(60, description="Topics' retention limits are applied this often.")
    audit_interval: Seconds = Field(600, description="The invariants are checked on a stretch of the log this often.")
    maintenance_seconds: Seconds = Field(
        5, description="A retention or audit task stops after this time and goes on at its next turn."
    )
    delete_batch: int = Field(
        5_000,
        ge=1,
        le=1_000_000,
        description="Retention deletes at most so many batches in one transaction.",
    )
    queued_seconds: Seconds = Field(
        60,
        description="A partition counts as queued at most this long; afterwards it may be queued a second time.",
    )

    pool_open: int = Field(25, ge=1, le=1000, description="At most so many database connections per process.")
    pool_idle: int = Field(
        10,
        ge=0,
        le=1000,
        description="So many of them are kept when idle (never more than the process has threads for).",
    )
    pool_lifetime: Seconds = Field(3600, description="A connection is replaced after this time.")
    pool_wait: Seconds = Field(10, description="Waiting for a free connection ends with an error after this time.")

    lock_timeout: Seconds = Field(
        1,
        description="Postgres gives up waiting for a lock after this time. A task waits once, after all others.",
    )
    statement_timeout: Seconds = Field(60, description="Postgres cancels a statement after this time.")
    transaction_timeout: Seconds = Field(120, description="Postgres (17 and later) ends a transaction after this time.")
    retries: int = Field(
        4, ge=0, le=20, description="A task repeats a transaction so often after a transient database error."
    )
    retry_seconds: Seconds = Field(
        0.02, description="First pause before a repetition; it doubles each time, with jitter, up to 5 s."
    )

    lease_seconds: Annotated[float, Field(ge=2, le=3600)] = Field(
        15,
        description="Workers without `-Q` share the shards out among themselves; those of one that died are taken "
        "over within this time.",
    )
    visibility_timeout: Annotated[int, Field(ge=10)] = Field(
        300,
        description="Redis hands a task to another worker when it was not finished after so many seconds.",
    )
    flower_auth: str | None = Field(
        None,
        repr=False,
        pattern=r"^[^:]+:.{8,}$",
        description="Flower's login, as `user:password` with 8 characters or more. Without it a password is made and "
        "kept in the data directory.",
    )
    metrics_topics: int = Field(
        200,
        ge=1,
        le=10_000,
        description="At most so many topics have metrics of their own, the oldest ones; the others are summed up as "
        "`(other)`.",
    )
    metrics_seconds: Seconds = Field(
        5, description="The exporter reads Postgres, Redis and the broker at most this often, whoever asks it."
    )
    heartbeat_file: Path | None = Field(
        None,
        description="File by which `celery -A tasks health` tells that this program lives. Defaults to "
        "`worker.heartbeat`, `beat.heartbeat` or `exporter.heartbeat` in the data directory; workers share theirs.",
    )
    tracing: bool = Field(
        False,  # noqa: FBT003 - a default
        description="Trace commit, fan-out and materialize with OpenTelemetry. Needs the extra `tracing`; the "
        "`OTEL_…` variables say where spans go.",
    )
    log_format: Literal["console", "json"] = Field(
        "console", description="One event a line, for people or for machines."
    )

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
                f"({self.hard_time_limit:g} s = task seconds + statement timeout + 10): Redis would hand a running "
                f"task to a second worker"
            )
        return self

    @model_validator(mode="after")
    def _one_candidate(self) -> Self:
        if self.candidate is None:
            if self.candidate_percent:
                raise ValueError("TIDEMARK_CANDIDATE_PERCENT needs TIDEMARK_CANDIDATE: a strategy to try")
        elif self.candidate_percent is None:
            raise ValueError(
                "TIDEMARK_CANDIDATE needs TIDEMARK_CANDIDATE_PERCENT: the share of partitions to try it on"
            )
        elif self.candidate == self.strategy:
            raise ValueError(f"TIDEMARK_CANDIDATE ({self.candidate}) is TIDEMARK_STRATEGY: nothing to compare")
        return self

    @model_validator(mode="after")
    def _batches_fit(self) -> Self:
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
        """Seconds after which Celery kills a task: its own budget, one last statement and a margin."""
        return max(self.task_seconds, self.maintenance_seconds) + self.statement_timeout + 10

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
            # A URL holds a password, and a message may end up in a log.
            given = f" (given: {item['input']!r})" if item["loc"] and not name.endswith(("_URL", "_AUTH")) else ""
            lines.append(f"{name}: {item['msg'].removeprefix('Value error, ')}{given}")
        raise SettingsError("; ".join(lines)) from None
