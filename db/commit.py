"""The hot path: commits uploaded objects. One round trip each; all the work is `tidemark.commit_object` in Postgres."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from config.errors import InvalidCommitError
from db.arrays import Int4Array, Int8Array
from db.statements import Connection, values
from db.translate import is_storable


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One record batch inside an uploaded object.

    `max_timestamp` is Kafka's: milliseconds since the epoch, of the newest record; -1 for none.
    """

    partition_id: int
    n_records: int
    byte_offset: int
    byte_length: int
    max_timestamp: int


def commit_object(
    conn: Connection,
    object_key: str,
    partition_ids: Sequence[int],
    n_records: Sequence[int],
    byte_offsets: Sequence[int],
    byte_lengths: Sequence[int],
    max_timestamps: Sequence[int],
) -> int:
    """Commit one object, one element per batch in every sequence; returns the object's id.

    The order of the sequences is the order of offsets within a partition. Repeating a commit with the same arguments
    returns the first id. On an autocommit connection the commit is durable when this returns; otherwise it is part
    of the caller's transaction.

    Its offsets are higher than those of all that was committed before its transaction wrote anything: that is before
    this call, unless the caller's transaction had written already.

    Raises InvalidCommitError, CommitTooLargeError (beyond 65,536 batches), CommitConflictError, UnknownPartitionError
    and ForeignClusterError; each leaves the database as it was.
    """
    try:
        parameters = (
            object_key,
            Int4Array(partition_ids),
            Int4Array(n_records),
            Int8Array(byte_offsets),
            Int4Array(byte_lengths),
            Int8Array(max_timestamps),
        )
    except (OverflowError, TypeError) as error:
        raise InvalidCommitError(
            f"object {object_key!r}: {error}. Pass integers that fit: 32 bits for partition ids, numbers of records "
            f"and byte lengths, 64 bits for byte offsets and timestamps."
        ) from None
    if not is_storable(object_key):
        raise InvalidCommitError(
            f"object {object_key!r}: the key is no text Postgres can store. Pass a str without NUL or lone surrogates."
        )
    (object_id,) = values(conn, "commit_object", parameters)
    return int(object_id)


def commit_batches(conn: Connection, object_key: str, batches: Iterable[Batch]) -> int:
    """Commit one object given batch by batch; otherwise as `commit_object`."""
    rows = list(batches)
    # Its fields stand in the order of the arguments.
    return commit_object(conn, object_key, *([getattr(row, field.name) for row in rows] for field in fields(Batch)))
