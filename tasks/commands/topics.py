"""`celery -A tasks topics create|list|show|set`."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Group as Lines
from rich.console import RenderableType

from config.queues import shard_of, shard_queue
from db.status import PartitionState, TopicState, describe_partitions, describe_topics
from db.topics import create_topic, set_retention
from tasks.commands.base import CSV, JSON, TIMEOUT, Group, answer, app_of, command, database
from tasks.commands.display import NOTHING, count, duration, label, number, pairs, size, table, text
from tasks.commands.parameters import NAME, SIZE_LIMIT, TIME_LIMIT

topics = Group("topics", help="Create topics, list them, show one and set its retention.")

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
# What is called otherwise here than by the database.
_FIELDS = {"topic": "name", "partition_count": "partitions", "backlog_counted": "counted", "lag_seconds": "lag"}


@command("create", *_RETENTION, TIMEOUT, JSON, within=topics)
@click.argument("name", type=NAME)
@click.option("-p", "--partitions", type=click.IntRange(1, 100_000), default=1)
def create(ctx: click.Context, name: str, partitions: int, **limits: int | None) -> None:
    """Create topic NAME."""
    with database(ctx) as conn, conn.transaction():
        topic_id = create_topic(conn, name, partitions)
        if any(limits.values()):
            set_retention(conn, name, **limits)
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
    # None is `none`; what was not given looks the same.
    given = {k: limit for k, limit in limits.items() if ctx.get_parameter_source(k) is not ParameterSource.DEFAULT}
    if not given:
        raise click.UsageError("nothing to set; give --retention-time 7d or --retention-size 1GB, for example", ctx)
    with database(ctx) as conn, conn.transaction():
        [before] = describe_topics(conn, [name])
        topic = replace(before, **given)
        set_retention(conn, name, retention_ms=topic.retention_ms, retention_bytes=topic.retention_bytes)
    answer(ctx, _topic(topic), f"{name}: retention {_retention(topic)}")


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
