"""`celery -A tasks topics create|list|show|set|grow|delete|truncate|offsets|producers`."""

from collections.abc import Iterable
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Group as Lines
from rich.console import RenderableType

from config.queues import shard_of, shard_queue
from db.fetch import list_offsets
from db.producers import ProducerState, producer_states
from db.retention import delete_records
from db.status import PartitionState, TopicState, describe_partitions, describe_topics, find_partition
from db.topics import add_partitions, create_topic, delete_topic, partition_ids, set_retention
from tasks.commands.base import CSV, JSON, TIMEOUT, Group, answer, app_of, command, database
from tasks.commands.display import NOTHING, count, duration, label, moment, number, pairs, size, table, text
from tasks.commands.parameters import NAME, OFFSET, PARTITION, SIZE_LIMIT, TIME_LIMIT

topics = Group("topics", help="Create topics, list and show them, change and delete them.")

_RETENTION = (
    click.Option(
        ["--retention-time", "retention_ms"],
        type=TIME_LIMIT,
        help="Delete batches that are older, such as 7d, 12h; `none`: keep them.",
    ),
    click.Option(
        ["--retention-size", "retention_bytes"],
        type=SIZE_LIMIT,
        help="Delete a partition's oldest batches beyond this, such as 1GB, 500MiB; `none`: keep them.",
    ),
)
_TOPIC_CSV = ("topic", "partition_count", "records", "byte_size", "retention_ms", "retention_bytes", "id", "created_at")
_PARTITION_CSV = (
    *("topic", "partition", "partition_id", "shard", "queue", "start_offset", "end_offset"),
    *("byte_size", "backlog", "backlog_counted", "lag_seconds"),
)
_DATES = ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%d %H:%M:%S")
# Of one request.
_PAGE = 10_000
# What is called otherwise here than by the database.
_FIELDS = {"topic": "name", "partition_count": "partitions", "backlog_counted": "counted", "lag_seconds": "lag"}


@command("create", *_RETENTION, TIMEOUT, JSON, within=topics)
@click.argument("name", type=NAME)
@click.option("-p", "--partitions", type=click.IntRange(1, 100_000), help="Default: TIDEMARK_DEFAULT_PARTITIONS.")
def create(ctx: click.Context, name: str, partitions: int | None, **limits: Any) -> None:
    """Create topic NAME."""
    defaults = app_of(ctx).settings
    partitions = partitions or defaults.default_partitions
    given = _given(ctx, limits)
    if "retention_ms" not in given and defaults.default_retention_seconds is not None:
        limits["retention_ms"] = round(defaults.default_retention_seconds * 1000)
    if "retention_bytes" not in given:
        limits["retention_bytes"] = defaults.default_retention_bytes
    with database(ctx) as conn:
        topic_id = create_topic(conn, name, partitions, **limits)
    said = f"{name}: created with {count(partitions, 'partition')}"
    answer(ctx, {"topic": name, "id": topic_id, "partitions": partitions}, said)


@command("list", TIMEOUT, JSON, CSV, within=topics)
def list_(ctx: click.Context) -> None:
    """List all topics."""
    with database(ctx) as conn:
        found = describe_topics(conn)
    words: RenderableType = text("no topics; create one with: celery -A tasks topics create NAME")
    if found:
        words = rows = table("Topic", ">Partitions", ">Records", ">Size", "Retention")
        for t in found:
            rows.add_row(label(t.name), number(t.partitions), number(t.records), size(t.byte_size), _retention(t))
    told = [_topic(topic) for topic in found]
    answer(ctx, told, words, csv=(_TOPIC_CSV, told))


@command("show", TIMEOUT, JSON, CSV, within=topics)
@click.argument("topic", metavar="NAME", type=NAME)
@click.option("--pending", is_flag=True, help="Only partitions with a backlog.")
def show(ctx: click.Context, topic: str, *, pending: bool) -> None:
    """Show topic NAME and its partitions."""
    with database(ctx) as conn:
        [found] = describe_topics(conn, [topic])
        states = describe_partitions(conn, [topic], only_pending=pending)
    partitions = [_partition(p, app_of(ctx).settings.shards) for p in states]
    about: dict[str, RenderableType] = {
        "Topic": label(found.name),
        "Id": str(found.id),
        "Created": f"{found.created_at:%Y-%m-%d %H:%M:%S %Z}",
        "Retention": _retention(found, exact=True),
        "Partitions": number(found.partitions),
        "Records": f"{number(found.records)} ({size(found.byte_size)})",
    }
    words: list[RenderableType] = [pairs(*((text(name, "bold"), value) for name, value in about.items())), ""]
    rows = table(">Partition", ">Id", ">Shard", ">Start", ">End", ">Size", ">Backlog", ">Lag")
    for p, row in zip(states, partitions, strict=True):
        ids = str(p.partition), str(p.partition_id), str(row["shard"])
        backlog = number(p.backlog) + "+" * (not p.counted)
        ends = number(p.start_offset), number(p.end_offset)
        rows.add_row(*ids, *ends, size(p.byte_size), backlog, duration(p.lag))
    if states:
        legend = f"Shard n is the queue {shard_queue(0).removesuffix('0')}n; backlog in events."
        words += [rows, text(legend, "dim")]
    else:
        words.append(text("no partition has a backlog"))
    csv = _PARTITION_CSV, ({"topic": topic, **p} for p in partitions)
    answer(ctx, {**_topic(found), "partitions": partitions}, Lines(*words), csv=csv)


@command("set", *_RETENTION, TIMEOUT, JSON, within=topics)
@click.argument("name", type=NAME)
def set_(ctx: click.Context, name: str, **limits: Any) -> None:
    """Set the retention of topic NAME.

    What is not given stays.
    """
    given = _given(ctx, limits)
    if not given:
        raise click.UsageError("nothing to set; give --retention-time 7d or --retention-size 1GB, for example", ctx)
    with database(ctx) as conn, conn.transaction():
        [before] = describe_topics(conn, [name])
        topic = replace(before, **given)
        set_retention(conn, name, retention_ms=topic.retention_ms, retention_bytes=topic.retention_bytes)
    answer(ctx, _topic(topic), f"{name}: retention {_retention(topic)}")


def _given(ctx: click.Context, limits: dict[str, Any]) -> dict[str, Any]:
    """Those limits that are on the command line: None is `none`, and what was not given looks the same."""
    return {k: limit for k, limit in limits.items() if ctx.get_parameter_source(k) is not ParameterSource.DEFAULT}


@command("grow", TIMEOUT, JSON, within=topics)
@click.argument("name", type=NAME)
@click.argument("partitions", type=click.IntRange(1, 100_000))
def grow(ctx: click.Context, name: str, partitions: int) -> None:
    """Give topic NAME more partitions.

    PARTITIONS is how many it has then.
    """
    with database(ctx) as conn:
        add_partitions(conn, name, partitions)
    answer(ctx, {"topic": name, "partitions": partitions}, f"{name}: has {count(partitions, 'partition')}")


@command("delete", TIMEOUT, JSON, within=topics)
@click.argument("name", type=NAME)
@click.option("--yes", is_flag=True, help="Do not ask.")
def delete(ctx: click.Context, name: str, *, yes: bool) -> None:
    """Delete topic NAME and all it holds.

    Its name is free at once; workers delete what it held.
    """
    with database(ctx) as conn:
        [found] = describe_topics(conn, [name])
        if not yes:
            holds = f"{count(found.partitions, 'partition')} with {count(found.records, 'record')}"
            click.confirm(f"Delete {name}, {holds}?", abort=True, err=True)
        topic_id = delete_topic(conn, name)
    answer(ctx, {"topic": name, "id": topic_id}, f"{name}: deleted")


@command("truncate", TIMEOUT, JSON, within=topics)
@click.argument("topic", metavar="NAME", type=NAME)
@click.argument("partition", type=PARTITION)
@click.argument("offset", type=OFFSET)
def truncate(ctx: click.Context, topic: str, partition: int, offset: str | int) -> None:
    """Delete the oldest records of a partition.

    Those before OFFSET: a number, or latest for all of them.
    """
    if offset == "earliest":
        raise click.UsageError("nothing lies before earliest; give an offset, or latest for all records", ctx)
    with database(ctx) as conn:
        start = delete_records(conn, find_partition(conn, topic, partition), -1 if isinstance(offset, str) else offset)
    answer(
        ctx,
        {"topic": topic, "partition": partition, "start_offset": start},
        f"{topic}/{partition}: starts at offset {number(start)}",
    )


@command("offsets", TIMEOUT, JSON, CSV, within=topics)
@click.argument("topic", metavar="NAME", type=NAME)
@click.argument("time", type=click.DateTime(_DATES), metavar="TIME")
def offsets(ctx: click.Context, topic: str, time: datetime) -> None:
    """List the offsets of topic NAME at TIME.

    Of each partition the first one whose batch may hold a record of that time or later. TIME is a date in UTC, such
    as 2026-11-26 or 2026-11-26T16:30:00.
    """
    milliseconds = round(time.replace(tzinfo=UTC).timestamp() * 1000)
    with database(ctx) as conn:
        ids = partition_ids(conn, topic)
        pages = (ids[first : first + _PAGE] for first in range(0, len(ids), _PAGE))
        found = [offset for page in pages for offset in list_offsets(conn, page, [milliseconds] * len(page))]
    told = [
        {"topic": topic, "partition": n, "offset": o.log_offset, "max_timestamp": o.max_timestamp}
        for n, o in enumerate(found)
    ]
    rows = table(">Partition", ">Offset", ">Newest record of its batch")
    for n, o in enumerate(found):
        at = NOTHING if o.max_timestamp is None else moment(o.max_timestamp)
        rows.add_row(str(n), NOTHING if o.log_offset is None else number(o.log_offset), at)
    answer(ctx, told, rows, csv=(("topic", "partition", "offset", "max_timestamp"), told))


@command("producers", TIMEOUT, JSON, CSV, within=topics)
@click.argument("topic", metavar="NAME", type=NAME)
@click.argument("partition", type=PARTITION)
@click.option("--before", type=click.IntRange(min=0), help="Begin below this producer id.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=1_000, help="List at most this many.")
def producers(ctx: click.Context, topic: str, partition: int, before: int | None, limit: int) -> None:
    """List the idempotent producers of a partition, the newest first."""
    with database(ctx) as conn:
        found = producer_states(conn, find_partition(conn, topic, partition), before=before, limit=limit)
    told = [{**asdict(p), "last_commit": p.last_commit and p.last_commit.isoformat()} for p in found]
    words: RenderableType = text("no idempotent producer is known")
    if found:
        words = rows = table(">Producer", ">Epoch", ">Last sequence", ">Batches", "Last commit")
        for p in found:
            at = NOTHING if p.last_commit is None else f"{p.last_commit:%Y-%m-%d %H:%M:%S}"
            numbers = str(p.producer_id), str(p.producer_epoch), str(p.last_sequence), number(p.batches)
            rows.add_row(*numbers, at)
    answer(ctx, told, words, csv=(ProducerState.__slots__, told))


def _retention(topic: TopicState, *, exact: bool = False) -> str:
    limits = []
    if topic.retention_ms is not None:
        limits.append(duration(topic.retention_ms / 1000) + f" ({number(topic.retention_ms)} ms)" * exact)
    if topic.retention_bytes is not None:
        limits.append(size(topic.retention_bytes) + f" ({number(topic.retention_bytes)} bytes)" * exact)
    return ", ".join(limits) or NOTHING


def _topic(topic: TopicState) -> dict[str, Any]:
    return {**_told(topic, _TOPIC_CSV), "created_at": topic.created_at.isoformat()}


def _partition(partition: PartitionState, shards: int) -> dict[str, Any]:
    shard = shard_of(partition.partition_id, shards)
    own = [column for column in _PARTITION_CSV if column not in {"topic", "shard", "queue"}]
    return {**_told(partition, own), "shard": shard, "queue": shard_queue(shard)}


def _told(state: TopicState | PartitionState, columns: Iterable[str]) -> dict[str, Any]:
    return {column: getattr(state, _FIELDS.get(column, column)) for column in columns}
