"""`celery -A tasks topics create|list|show|set`."""

from typing import Any

import click
from click.core import ParameterSource

from config.queues import shard_of, shard_queue
from db.pool import connect
from db.status import PartitionState, TopicState, describe_partitions, describe_topics
from db.topics import create_topic, set_retention
from tasks.commands.base import app_of, echo_json, json_option
from tasks.commands.display import NOTHING, columns, console, count, duration, number, size, table, text
from tasks.commands.group import group
from tasks.commands.parameters import LIMIT, NAME


@group("topics")
def topics(_: click.Context) -> None:
    """Create topics, list them, show one and set its retention."""


@topics.subcommand("create")
@click.argument("name", type=NAME)
@click.option("-p", "--partitions", type=click.IntRange(1, 100_000), default=1, show_default=True)
@click.option("--retention-ms", type=LIMIT, help="Delete batches older than so many milliseconds.")
@click.option("--retention-bytes", type=LIMIT, help="Delete a partition's oldest batches beyond so many bytes.")
@json_option
def create(
    ctx: click.Context,
    name: str,
    partitions: int,
    retention_ms: int | None,
    retention_bytes: int | None,
    *,
    as_json: bool,
) -> None:
    """Create topic NAME."""
    app = app_of(ctx)
    with connect(app.database_url, app.settings) as conn, conn.transaction():
        topic_id = create_topic(conn, name, partitions)
        if retention_ms is not None or retention_bytes is not None:
            set_retention(conn, name, retention_ms=retention_ms, retention_bytes=retention_bytes)
    if as_json:
        echo_json({"topic": name, "id": topic_id, "partitions": partitions})
    else:
        console(ctx).print(text(f"{name}: created with {count(partitions, 'partition')}"))


@topics.subcommand("list")
@json_option
def list_(ctx: click.Context, *, as_json: bool) -> None:
    """List all topics."""
    app = app_of(ctx)
    with connect(app.database_url, app.settings) as conn:
        found = describe_topics(conn)
    if as_json:
        echo_json([_topic_json(topic) for topic in found])
        return
    out = console(ctx)
    if not found:
        out.print(text("no topics; create one with: celery -A tasks topics create NAME"))
        return
    rows = table("Topic", ">Partitions", ">Records", ">Size", "Retention")
    for topic in found:
        rows.add_row(
            text(topic.name), number(topic.partitions), number(topic.records), size(topic.byte_size), _retention(topic)
        )
    out.print(rows)


@topics.subcommand("show")
@click.argument("name", type=NAME)
@click.option("--pending", is_flag=True, help="Only partitions with a backlog.")
@json_option
def show(ctx: click.Context, name: str, *, pending: bool, as_json: bool) -> None:
    """Show topic NAME and its partitions."""
    app = app_of(ctx)
    with connect(app.database_url, app.settings) as conn:
        [topic] = describe_topics(conn, [name])
        partitions = describe_partitions(conn, [name], only_pending=pending)
    shards = app.settings.shards
    if as_json:
        echo_json({**_topic_json(topic), "partitions": [_partition_json(p, shards) for p in partitions]})
        return
    out = console(ctx)
    out.print(
        columns(
            [
                ("Topic", topic.name),
                ("Id", topic.id),
                ("Created", f"{topic.created_at:%Y-%m-%d %H:%M:%S %Z}"),
                ("Retention", _retention(topic, exact=True)),
                ("Partitions", number(topic.partitions)),
                ("Records", f"{number(topic.records)} ({size(topic.byte_size)})"),
            ]
        )
    )
    out.print()
    if not partitions:
        out.print(text("no partition has a backlog"))
        return
    rows = table(">Partition", ">Id", ">Shard", ">Start", ">End", ">Size", ">Backlog", ">Lag")
    for p in partitions:
        rows.add_row(
            str(p.partition),
            str(p.partition_id),
            str(shard_of(p.partition_id, shards)),
            number(p.start_offset),
            number(p.end_offset),
            size(p.byte_size),
            number(p.backlog) + "+" * (not p.counted),
            duration(p.lag),
        )
    out.print(rows)
    out.print(text(f"Shard n is the queue {shard_queue(0).removesuffix('0')}n; backlog in events.", "dim"))


@topics.subcommand("set")
@click.argument("name", type=NAME)
@click.option("--retention-ms", type=LIMIT, help="Delete older batches; `none`: keep them.")
@click.option("--retention-bytes", type=LIMIT, help="Keep so much per partition; `none`: all.")
@json_option
def set_(
    ctx: click.Context, name: str, retention_ms: int | None, retention_bytes: int | None, *, as_json: bool
) -> None:
    """Set the retention of topic NAME.

    What is not given stays.
    """
    # None is `none`; what was not given looks the same.
    given = {name for name in ("retention_ms", "retention_bytes") if _was_given(ctx, name)}
    if not given:
        raise click.UsageError("nothing to set; give --retention-ms or --retention-bytes (a number, or none)", ctx)
    app = app_of(ctx)
    with connect(app.database_url, app.settings) as conn, conn.transaction():
        [before] = describe_topics(conn, [name])
        set_retention(
            conn,
            name,
            retention_ms=retention_ms if "retention_ms" in given else before.retention_ms,
            retention_bytes=retention_bytes if "retention_bytes" in given else before.retention_bytes,
        )
        [topic] = describe_topics(conn, [name])
    if as_json:
        echo_json(_topic_json(topic))
    else:
        console(ctx).print(text(f"{name}: retention {_retention(topic)}"))


def _was_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not ParameterSource.DEFAULT


def _retention(topic: TopicState, *, exact: bool = False) -> str:
    limits = []
    if topic.retention_ms is not None:
        limits.append(duration(topic.retention_ms / 1000) + f" ({number(topic.retention_ms)} ms)" * exact)
    if topic.retention_bytes is not None:
        limits.append(size(topic.retention_bytes) + f" ({number(topic.retention_bytes)} bytes)" * exact)
    return ", ".join(limits) or NOTHING


def _topic_json(topic: TopicState) -> dict[str, Any]:
    return {
        "topic": topic.name,
        "id": topic.id,
        "created_at": topic.created_at.isoformat(),
        "partition_count": topic.partitions,
        "retention_ms": topic.retention_ms,
        "retention_bytes": topic.retention_bytes,
        "records": topic.records,
        "byte_size": topic.byte_size,
    }


def _partition_json(partition: PartitionState, shards: int) -> dict[str, Any]:
    shard = shard_of(partition.partition_id, shards)
    return {
        "partition": partition.partition,
        "partition_id": partition.partition_id,
        "shard": shard,
        "queue": shard_queue(shard),
        "start_offset": partition.start_offset,
        "end_offset": partition.end_offset,
        "byte_size": partition.byte_size,
        "backlog": partition.backlog,
        "backlog_counted": partition.counted,
        "lag_seconds": partition.lag,
    }
