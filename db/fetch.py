"""The read path: batches of a partition from an offset on."""

from dataclasses import dataclass

from config.errors import UnknownPartitionError
from db.statements import Connection, all_
from db.translate import is_int


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
    conn: Connection,
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
    return all_(conn, FetchedBatch, "fetch_batches", (partition_id, from_offset, max_bytes, max_batches))
