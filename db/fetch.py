"""The read path: batches of partitions from an offset on, and offsets by time."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from time import monotonic
from typing import Any, Literal

from config.errors import InvalidFetchError, UnknownPartitionError
from db.arrays import Int4Array, Int8Array
from db.receipts import POLL_SECONDS, Moves, NoMoves
from db.statements import Connection, all_, rows
from db.translate import is_int

MAX_BYTES = 50 * 1024 * 1024
LATEST, EARLIEST, MAX_TIMESTAMP = -1, -2, -3
FetchError = Literal["unknown_partition", "offset_out_of_range", "offset_not_available", "malformed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedBatch:
    """A batch and where its bytes are: `object_key`, from `byte_offset`, `byte_length` bytes."""

    start_offset: int
    n_records: int
    object_key: str
    byte_offset: int
    byte_length: int
    max_timestamp: int


@dataclass(frozen=True, slots=True)
class FetchRequest:
    """What is asked of one partition: batches from an offset on, `max_bytes` at most."""

    partition_id: int
    from_offset: int
    max_bytes: int = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchedPartition:
    """The answer for one partition; its log has the offsets `[start_offset, end_offset)`, None where it is unknown."""

    partition_id: int
    error: FetchError | None
    start_offset: int | None
    end_offset: int | None
    batches: list[FetchedBatch]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedOffset:
    """An offset, and the greatest timestamp of its batch where a time was asked for; None where there is none."""

    partition_id: int
    error: FetchError | None
    log_offset: int | None
    max_timestamp: int | None


def fetch_batches(
    conn: Connection,
    partition_id: int,
    from_offset: int,
    *,
    max_bytes: int = MAX_BYTES,
    max_batches: int = 500,
) -> list[FetchedBatch]:
    """Batches from `from_offset` on, the first of which contains it; empty at the end offset.

    At most `max_batches`, and no more than fit into `max_bytes`, but always one where there is one.

    Raises UnknownPartitionError, OffsetOutOfRangeError and InvalidFetchError.
    """
    if not is_int(partition_id):
        raise UnknownPartitionError(f"partition id {partition_id} does not exist")
    return all_(conn, FetchedBatch, "fetch_batches", (partition_id, from_offset, max_bytes, max_batches))


def fetch_partitions(
    conn: Connection, requests: Iterable[FetchRequest], *, max_bytes: int = MAX_BYTES, max_batches: int = 5_000
) -> list[FetchedPartition]:
    """Batches of many partitions, in their order and in one snapshot; an answer for each, with an error of its own.

    At most `max_bytes` and `max_batches` in all. The first batch comes whatever its size, any other one where it fits.

    Raises InvalidFetchError for limits below 1, numbers that do not fit and more than 10,000 partitions.
    """
    wanted = list(requests)
    try:
        arrays = _arrays(
            (Int4Array, [r.partition_id for r in wanted]),
            (Int8Array, [r.from_offset for r in wanted]),
            (Int8Array, [r.max_bytes for r in wanted]),
        )
    except AttributeError as error:
        raise InvalidFetchError(f"{error}. Pass requests as db.fetch.FetchRequest.") from None
    found = rows(conn, "fetch_partitions", (*arrays, max_bytes, max_batches))
    return [_answer(list(answers)) for _, answers in groupby(found, lambda row: row.request)]


def _answer(found: Sequence[Any]) -> FetchedPartition:
    names = FetchedBatch.__slots__
    batches = [FetchedBatch(**{name: getattr(row, name) for name in names}) for row in found if row.n_records]
    head = found[0]
    return FetchedPartition(
        partition_id=head.partition_id,
        error=head.error,
        start_offset=head.log_start,
        end_offset=head.log_end,
        batches=batches,
    )


def wait_for_batches(
    conn: Connection,
    requests: Iterable[FetchRequest],
    *,
    max_wait: float,
    min_bytes: int = 1,
    max_bytes: int = MAX_BYTES,
    max_batches: int = 5_000,
    moves: Moves | None = None,
    poll_seconds: float = POLL_SECONDS,
) -> list[FetchedPartition]:
    """As `fetch_partitions`, once there are `min_bytes` in all, or an error, or `max_wait` seconds are over.

    Looks again when `moves` says that one of the partitions moved, and every `poll_seconds` at least.
    """
    wanted = list(requests)
    ids = {request.partition_id for request in wanted}
    for _ in _looks(ids, max_wait, moves, poll_seconds):
        found = fetch_partitions(conn, wanted, max_bytes=max_bytes, max_batches=max_batches)
        size = sum(batch.byte_length for partition in found for batch in partition.batches)
        if size >= min(min_bytes, max_bytes) or any(partition.error for partition in found):
            break
    return found


def list_offsets(conn: Connection, partition_ids: Sequence[int], times: Sequence[int]) -> list[ListedOffset]:
    """The offset of each partition at a time, in milliseconds since the epoch, or LATEST, EARLIEST, MAX_TIMESTAMP.

    For a time: the first offset whose batch may hold a record of that time or later. An error by partition.

    Raises InvalidFetchError for sequences that differ, numbers that do not fit and more than 10,000 partitions.
    """
    arrays = _arrays((Int4Array, partition_ids), (Int8Array, times))
    return all_(conn, ListedOffset, "list_offsets", arrays)


def _arrays(*wanted: tuple[type[Int4Array], Sequence[int]]) -> list[Int4Array]:
    try:
        return [kind(numbers) for kind, numbers in wanted]
    except (ValueError, TypeError) as error:
        raise InvalidFetchError(
            f"{error}. Pass partition ids of 32 bits, and offsets, sizes and times of 64 bits."
        ) from None


def _looks(ids: set[int], seconds: float, moves: Moves | None, poll_seconds: float) -> Iterator[None]:
    """Now, then whenever one of the partitions has moved, and at the end of every poll, until the time is over."""
    source = moves or NoMoves()
    until = monotonic() + seconds
    yield
    while (left := until - monotonic()) > 0:
        poll = monotonic() + min(poll_seconds, left)
        while (left := poll - monotonic()) > 0 and ids.isdisjoint(source.wait(left)):
            pass
        yield
