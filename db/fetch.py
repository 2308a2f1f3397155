"""The read path: batches of a partition from an offset on."""

from dataclasses import dataclass
from typing import Any

import psycopg

from config.errors import UnknownPartitionError
from db.statements import run
from db.translate import domain_errors, is_int


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedBatch:
    """A batch and where its bytes are: `object_key`, from `byte_offset`, `byte_length` bytes."""

    start_offset: int
    n_records: int
    object_key: str
    byte_offset: int
    byte_length: int
    max_timestamp: int


def fetch_batches(
    conn: psycopg.Connection[Any],
    partition_id: int,
    from_offset: int,
    *,
    max_bytes: int = 50 * 1024 * 1024,
    max_batches: int = 500,
) -> list[FetchedBatch]:
    """Batches from `from_offset` on, the first of which contains it; empty at the end offset.

    At most `max_batches`, and no more than fit into `max_bytes`, but always one where there is one.

    Raises UnknownPartitionError, OffsetOutOfRangeError and InvalidFetchError.
    """
    if not is_int(partition_id):
        raise UnknownPartitionError(f"partition id {partition_id} does not exist")
    with domain_errors():
        rows = run(conn, "fetch_batches", (partition_id, from_offset, max_bytes, max_batches)).fetchall()
    return [
        FetchedBatch(
            start_offset=row[0],
            n_records=row[1],
            object_key=row[2],
            byte_offset=row[3],
            byte_length=row[4],
            max_timestamp=row[5],
        )
        for row in rows
    ]
