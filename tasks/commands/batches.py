"""`celery -A tasks commit KEY [FILE]` and `fetch TOPIC PARTITION [OFFSET]`: write batches to the log, and read them."""

import json
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Annotated, Any, BinaryIO

import click
import psycopg
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Group, RenderableType

from config.errors import OffsetOutOfRangeError, UnknownTopicError
from db.commit import Batch, columns, commit_object
from db.fetch import FetchedBatch, fetch_batches
from db.status import find_partition, read_offsets
from db.topics import PartitionIds
from tasks.commands.base import CSV, JSON, OUTPUT, TIMEOUT, answer, command, database, echo_csv
from tasks.commands.display import count, label, moment, number, plain, size, table, text
from tasks.commands.parameters import MAX_BIGINT, MAX_INT, NAME, OFFSET, PARTITION, SIZE

_SHOWN = 10
# The year 1980: what is older was hardly meant in milliseconds.
_EARLIEST = 315_532_800_000
_POLL_SECONDS = 0.2


# --- commit


class Line(BaseModel):
    """One batch as a line of JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    topic: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
    partition: Annotated[int, Field(ge=0, le=MAX_INT)]
    n_records: Annotated[int, Field(ge=1, le=MAX_INT)]
    byte_offset: Annotated[int, Field(ge=0, le=MAX_BIGINT)]
    byte_length: Annotated[int, Field(ge=0, le=MAX_INT)]
    max_timestamp: Annotated[int, Field(ge=-MAX_BIGINT - 1, le=MAX_BIGINT)]


@command("commit", TIMEOUT, JSON)
@click.argument("key", type=NAME)
@click.argument("file", type=click.File("rb"), default="-")
def commit(ctx: click.Context, key: str, file: BinaryIO) -> None:
    """Commit the object uploaded as KEY, and print its id.

    FILE (default: standard input) holds a line for each record batch in it:

    \b
    {"topic": "orders", "partition": 3, "n_records": 10, "byte_offset": 0,
     "byte_length": 1200, "max_timestamp": 1700000000000}

    on one line, the time in milliseconds since the epoch. All of them are committed or none. Repeating a commit is
    safe: it returns the same id.
    """  # noqa: D301 - click's mark for lines that stay as they are
    if file.isatty():
        click.echo("reading batches from the terminal, one JSON object a line; Ctrl-D ends", err=True)
    errors: list[str] = []
    lines = list(_parse(file, errors))
    if not lines and not errors:
        raise click.ClickException("nothing was committed: there is no batch in the input")
    with database(ctx) as conn:
        batches = list(_resolve(conn, lines, errors))
        if errors:
            more = [f"… and {len(errors) - _SHOWN} more"] * (len(errors) > _SHOWN)
            raise click.ClickException("\n  ".join(["nothing was committed:", *errors[:_SHOWN], *more]))
        object_id = commit_object(conn, key, *columns(batches))
    # Kafka's -1 is no time at all, and 0 no mistake of units.
    early = [(n, line.max_timestamp) for n, line in lines if 0 < line.max_timestamp < _EARLIEST]
    for n, timestamp in early[:1]:
        others = f", and {len(early) - 1} more" * (len(early) > 1)
        found = f"max_timestamp {timestamp} (line {n}{others}) is {moment(timestamp)} in milliseconds"
        click.echo(f"warning: {found}; was it meant in seconds?", err=True)
    records = sum(batch.n_records for batch in batches)
    answer(ctx, {"object_id": object_id, "key": key, "batches": len(batches), "records": records}, str(object_id))


def _parse(file: Iterable[bytes], errors: list[str]) -> Iterator[tuple[int, Line]]:
    for n, content in enumerate(file, 1):
        if not content.strip():
            continue
        try:
            yield n, Line.model_validate_json(content.strip())
        except ValidationError as invalid:
            for problem in invalid.errors(include_url=False, include_input=False):
                where = ".".join(str(part) for part in problem["loc"])
                errors.append(f"line {n}: {plain(f'{where}: ' * bool(where) + problem['msg'])}")


def _resolve(conn: psycopg.Connection[Any], lines: Iterable[tuple[int, Line]], errors: list[str]) -> Iterator[Batch]:
    """Batches with partition ids in place of names."""
    known = PartitionIds()
    unknown = set()
    for n, line in lines:
        if line.topic not in unknown:
            try:
                ids = known.get(conn, line.topic)
            except UnknownTopicError:
                unknown.add(line.topic)
        if line.topic in unknown:
            errors.append(f"line {n}: topic {line.topic!r} does not exist")
        elif line.partition >= len(ids):
            only = f"only 0 to {len(ids) - 1}"
            errors.append(f"line {n}: topic {line.topic!r} has no partition {line.partition}, {only}")
        else:
            yield Batch(partition_id=ids[line.partition], **line.model_dump(exclude={"topic", "partition"}))


# --- fetch


@command("fetch", TIMEOUT, JSON, CSV)
@click.argument("topic", type=NAME)
@click.argument("partition", type=PARTITION)
@click.argument("offset", type=OFFSET, default="earliest")
@click.option("--max-bytes", type=SIZE, default="50MiB")
@click.option("--max-batches", type=click.IntRange(1, MAX_INT), default=100)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes until Ctrl-C; with --json one line a batch.")
def fetch(ctx: click.Context, topic: str, partition: int, offset: str | int, *, follow: bool, **limits: int) -> None:
    """List the batches of a partition.

    From OFFSET on: a number, earliest (the default) or latest. The first batch contains OFFSET, perhaps in its middle.
    """
    output = ctx.meta.get(OUTPUT)
    with database(ctx) as conn:
        partition_id = find_partition(conn, topic, partition)
        with conn.transaction():
            conn.execute("set transaction isolation level repeatable read, read only")
            start, end = read_offsets(conn, partition_id)
            position = {"earliest": start, "latest": end}[offset] if isinstance(offset, str) else offset
            if not start <= position <= end:
                held = f"{topic}/{partition} holds {start} to {end}"
                raise OffsetOutOfRangeError(f"offset {position} is out of range: {held}")
            batches = fetch_batches(conn, partition_id, position, **limits)

        def coming() -> Iterator[FetchedBatch]:
            nonlocal batches, position
            while True:
                for batch in batches:
                    yield batch
                    position = batch.start_offset + batch.n_records
                if not batches:
                    time.sleep(_POLL_SECONDS)
                batches = fetch_batches(conn, partition_id, position, **limits)

        # Ctrl-C is how following ends.
        with suppress(KeyboardInterrupt):
            if output == "csv":
                echo_csv([f.name for f in fields(FetchedBatch)], map(asdict, coming() if follow else batches))
            elif follow:
                for batch in coming():
                    click.echo(json.dumps(asdict(batch)) if output == "json" else _line(batch))
            else:
                log = {"topic": topic, "partition": partition, "start_offset": start, "end_offset": end}
                document = {**log, "batches": [asdict(batch) for batch in batches]}
                answer(ctx, document, _show(start, end, batches))


def _show(start: int, end: int, batches: list[FetchedBatch]) -> RenderableType:
    rows = table(">Offset", ">Records", ">Newest record", ">From byte", ">Bytes", "Object")
    for b in batches:
        numbers = [number(n) for n in (b.start_offset, b.n_records, b.byte_offset, b.byte_length)]
        rows.add_row(*numbers[:2], moment(b.max_timestamp), *numbers[2:], label(b.object_key))
    records = sum(batch.n_records for batch in batches)
    log_bytes = size(sum(batch.byte_length for batch in batches))
    total = f"{count(len(batches), 'batch')}, {count(records, 'record')}, {log_bytes}"
    last = text(f"{total}; the log holds {number(start)} to {number(end)}", "dim")
    return Group(rows, last) if batches else last


def _line(batch: FetchedBatch) -> str:
    where = f"{batch.byte_offset}+{batch.byte_length} {plain(batch.object_key)}"
    return f"{batch.start_offset} {batch.n_records} {moment(batch.max_timestamp)} {where}"
