"""`celery -A tasks fetch TOPIC PARTITION [OFFSET]`: read a log."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields

import click
from rich.console import Console

from config.errors import OffsetOutOfRangeError
from db.fetch import FetchedBatch, fetch_batches
from db.status import find_partition, read_offsets
from tasks.commands.base import command, database, echo_csv, echo_json, output_options, timeout_option
from tasks.commands.display import console, count, label, moment, number, plain, size, table, text
from tasks.commands.parameters import MAX_INT, NAME, OFFSET, PARTITION, SIZE

_POLL_SECONDS = 0.2


@command("fetch")
@click.argument("topic", type=NAME)
@click.argument("partition", type=PARTITION)
@click.argument("offset", type=OFFSET, default="earliest")
@click.option("--max-bytes", type=SIZE, default="50MiB", show_default=True)
@click.option("--max-batches", type=click.IntRange(1, MAX_INT), default=100, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes until Ctrl-C; with --json one line a batch.")
@timeout_option
@output_options
def fetch(
    ctx: click.Context,
    topic: str,
    partition: int,
    offset: str | int,
    max_bytes: int,
    max_batches: int,
    output: str | None,
    *,
    follow: bool,
) -> None:
    """List the batches of a partition.

    From OFFSET on: a number, earliest (the default) or latest. The first batch contains OFFSET, perhaps in its middle.
    """
    with database(ctx) as conn:
        partition_id = find_partition(conn, topic, partition)
        with conn.transaction():
            conn.execute("set transaction isolation level repeatable read, read only")
            start, end = read_offsets(conn, partition_id)
            position = {"earliest": start, "latest": end}[offset] if isinstance(offset, str) else offset
            if not start <= position <= end:
                held = f"{topic}/{partition} holds {start} to {end}"
                raise OffsetOutOfRangeError(f"offset {position} is out of range: {held}")
            batches = fetch_batches(conn, partition_id, position, max_bytes=max_bytes, max_batches=max_batches)

        def coming() -> Iterator[FetchedBatch]:
            nonlocal batches, position
            while True:
                for batch in batches:
                    yield batch
                    position = batch.start_offset + batch.n_records
                if not batches:
                    time.sleep(_POLL_SECONDS)
                batches = fetch_batches(conn, partition_id, position, max_bytes=max_bytes, max_batches=max_batches)

        # Ctrl-C is how following ends.
        with suppress(KeyboardInterrupt):
            if output == "csv":
                echo_csv([f.name for f in fields(FetchedBatch)], map(asdict, coming() if follow else batches))
            elif follow:
                for batch in coming():
                    click.echo(json.dumps(asdict(batch)) if output == "json" else _line(batch))
            elif output == "json":
                log = {"topic": topic, "partition": partition, "start_offset": start, "end_offset": end}
                echo_json({**log, "batches": [asdict(batch) for batch in batches]})
            else:
                _show(console(ctx), start, end, batches)


def _show(out: Console, start: int, end: int, batches: list[FetchedBatch]) -> None:
    if batches:
        rows = table(">Offset", ">Records", ">Newest record", ">From byte", ">Bytes", "Object")
        for batch in batches:
            rows.add_row(
                number(batch.start_offset),
                number(batch.n_records),
                moment(batch.max_timestamp),
                number(batch.byte_offset),
                number(batch.byte_length),
                label(batch.object_key),
            )
        out.print(rows)
    records = sum(batch.n_records for batch in batches)
    log_bytes = size(sum(batch.byte_length for batch in batches))
    total = f"{count(len(batches), 'batch')}, {count(records, 'record')}, {log_bytes}"
    out.print(text(f"{total}; the log holds {number(start)} to {number(end)}", "dim"))


def _line(batch: FetchedBatch) -> str:
    return (
        f"{batch.start_offset} {batch.n_records} {moment(batch.max_timestamp)} "
        f"{batch.byte_offset}+{batch.byte_length} {plain(batch.object_key)}"
    )
