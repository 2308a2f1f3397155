"""`celery -A tasks commit KEY [FILE]`: commit one object, its batches as JSON lines."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO

import click
import psycopg
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from config.errors import UnknownTopicError
from db.commit import Batch, commit_batches
from db.topics import PartitionIds
from tasks.commands.base import command, database, echo_json, json_option, timeout_option
from tasks.commands.display import moment, plain
from tasks.commands.parameters import MAX_BIGINT, MAX_INT, NAME

_SHOWN = 10
# The year 1980: what is older was hardly meant in milliseconds.
_EARLIEST = 315_532_800_000


class Line(BaseModel):
    """One batch as a line of JSON."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    topic: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,249}$")]
    partition: Annotated[int, Field(ge=0, le=MAX_INT)]
    n_records: Annotated[int, Field(ge=1, le=MAX_INT)]
    byte_offset: Annotated[int, Field(ge=0, le=MAX_BIGINT)]
    byte_length: Annotated[int, Field(ge=0, le=MAX_INT)]
    max_timestamp: Annotated[int, Field(ge=-MAX_BIGINT - 1, le=MAX_BIGINT)]


@dataclass(kw_only=True, slots=True)
class _Errors:
    """What is wrong, by line; only as many as are shown are kept."""

    shown: list[str] = field(default_factory=list)
    more: int = 0

    def add(self, line: int, problem: str) -> None:
        if len(self.shown) < _SHOWN:
            self.shown.append(f"line {line}: {plain(problem)}")
        else:
            self.more += 1

    def raise_if_any(self) -> None:
        if not self.shown:
            return
        more = [f"… and {self.more} more"] if self.more else []
        raise click.ClickException("\n  ".join(["nothing was committed:", *self.shown, *more]))


@command("commit")
@click.argument("key", type=NAME)
@click.argument("file", type=click.File("rb"), default="-")
@timeout_option
@json_option
def commit(ctx: click.Context, key: str, file: BinaryIO, *, as_json: bool) -> None:
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
    errors = _Errors()
    lines = list(_parse(file, errors))
    if not lines and not errors.shown:
        raise click.ClickException("nothing was committed: there is no batch in the input")
    with database(ctx) as conn:
        batches = _resolve(conn, lines, errors)
        errors.raise_if_any()
        object_id = commit_batches(conn, key, batches)
    _warn_of_times(lines)
    if as_json:
        records = sum(batch.n_records for batch in batches)
        echo_json({"object_id": object_id, "key": key, "batches": len(batches), "records": records})
    else:
        click.echo(object_id)


def _warn_of_times(lines: list[tuple[int, Line]]) -> None:
    # Kafka's -1 is no time at all, and 0 no mistake of units.
    early = [(number, line.max_timestamp) for number, line in lines if 0 < line.max_timestamp < _EARLIEST]
    if not early:
        return
    number, timestamp = early[0]
    more = f", and {len(early) - 1} more" if len(early) > 1 else ""
    found = f"max_timestamp {timestamp} (line {number}{more}) is {moment(timestamp)} in milliseconds"
    click.echo(f"warning: {found}; was it meant in seconds?", err=True)


def _parse(file: Iterable[bytes], errors: _Errors) -> Iterable[tuple[int, Line]]:
    for number, content in enumerate(file, 1):
        if not content.strip():
            continue
        try:
            yield number, Line.model_validate_json(content.strip())
        except ValidationError as invalid:
            for problem in invalid.errors(include_url=False, include_input=False):
                where = ".".join(str(part) for part in problem["loc"])
                errors.add(number, f"{where}: {problem['msg']}" if where else problem["msg"])


def _resolve(conn: psycopg.Connection[Any], lines: list[tuple[int, Line]], errors: _Errors) -> list[Batch]:
    """Batches with partition ids in place of names."""
    known = PartitionIds()
    unknown: dict[str, str] = {}
    batches = []
    for number, line in lines:
        if line.topic not in unknown:
            try:
                ids = known.get(conn, line.topic)
            except UnknownTopicError:
                unknown[line.topic] = f"topic {line.topic!r} does not exist"
        if line.topic in unknown:
            errors.add(number, unknown[line.topic])
        elif line.partition >= len(ids):
            errors.add(number, f"topic {line.topic!r} has no partition {line.partition}, only 0 to {len(ids) - 1}")
        else:
            batches.append(
                Batch(
                    partition_id=ids[line.partition],
                    n_records=line.n_records,
                    byte_offset=line.byte_offset,
                    byte_length=line.byte_length,
                    max_timestamp=line.max_timestamp,
                )
            )
    return batches
