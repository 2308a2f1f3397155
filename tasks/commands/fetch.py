"""`celery -A tasks fetch TOPIC PARTITION [OFFSET]`: read a log."""

import json
import time
from contextlib import suppress
from dataclasses import asdict

import click
from rich.console import Console

from db.fetch import FetchedBatch, fetch_batches
from db.pool import connect
from db.status import find_partition, read_offsets
from tasks.commands.base import app_of, command, echo_json, json_option
from tasks.commands.display import console, count, moment, number, size, table, text
from tasks.commands.parameters import MAX_BIGINT, MAX_INT, NAME, OFFSET, PARTITION

_POLL_SECONDS = 0.2


@command("fetch")
@click.argument("topic", type=NAME)
@click.argument("partition", type=PARTITION)
@click.argument("offset", type=OFFSET, default="earliest")
@click.option("--max-bytes", type=click.IntRange(1, MAX_BIGINT), default=50 * 1024 * 1024, show_default=True)
@click.option("--max-batches", type=click.IntRange(1, MAX_INT), default=100, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes until Ctrl-C; with --json one line a batch.")
@json_option
def fetch(
    ctx: click.Context,
    topic: str,
    partition: int,
    offset: str | int,
    max_bytes: int,
    max_batches: int,
    *,
    follow: bool,
    as_json: bool,
) -> None:
    """List the batches of a partition.

    From OFFSET on: a number, earliest (the default) or latest. The first batch contains OFFSET, perhaps in its middle.
    """
    app = app_of(ctx)
    out = console(ctx)
    with connect(app.database_url, app.settings) as conn:
        partition_id = find_partition(conn, topic, partition)
        with conn.transaction():
            conn.execute("set transaction isolation level repeatable read, read only")
            start, end = read_offsets(conn, partition_id)
            position = {"earliest": start, "latest": end}[offset] if isinstance(offset, str) else offset
            batches = fetch_batches(conn, partition_id, position, max_bytes=max_bytes, max_batches=max_batches)
        if not follow:
            _show(out, topic, partition, start, end, batches, as_json=as_json)
            return
        # Ctrl-C is how this ends.
        with suppress(KeyboardInterrupt):
            while True:
                for batch in batches:
                    click.echo(json.dumps(asdict(batch)) if as_json else _line(batch))
                if batches:
                    position = batches[-1].start_offset + batches[-1].n_records
                else:
                    time.sleep(_POLL_SECONDS)
                batches = fetch_batches(conn, partition_id, position, max_bytes=max_bytes, max_batches=max_batches)


def _show(
    out: Console, topic: str, partition: int, start: int, end: int, batches: list[FetchedBatch], *, as_json: bool
) -> None:
    if as_json:
        echo_json(
            {
                "topic": topic,
                "partition": partition,
                "start_offset": start,
                "end_offset": end,
                "batches": [asdict(batch) for batch in batches],
            }
        )
        return
    if batches:
        rows = table(">Offset", ">Records", "Newest record", ">From byte", ">Bytes", "Object")
        for batch in batches:
            rows.add_row(
                number(batch.start_offset),
                number(batch.n_records),
                moment(batch.max_timestamp),
                number(batch.byte_offset),
                number(batch.byte_length),
                text(batch.object_key),
            )
        out.print(rows)
    records = sum(batch.n_records for batch in batches)
    log_bytes = size(sum(batch.byte_length for batch in batches))
    total = f"{count(len(batches), 'batch')}, {count(records, 'record')}, {log_bytes}"
    out.print(text(f"{total}; the log holds {number(start)} to {number(end)}", "dim"))


def _line(batch: FetchedBatch) -> str:
    return (
        f"{batch.start_offset} {batch.n_records} {moment(batch.max_timestamp)} "
        f"{batch.byte_offset}+{batch.byte_length} {text(batch.object_key).plain}"
    )
