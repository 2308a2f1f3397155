"""The hot path: commits uploaded objects. One round trip each; the work is `tidemark.commit_batches` in Postgres."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from psycopg.errors import SerializationFailure
from psycopg.pq import TransactionStatus

from config.errors import InvalidCommitError
from db.arrays import Int4Array, Int8Array
from db.statements import Connection, values
from db.translate import is_storable

Verdict = Literal["accepted", "duplicate", "out_of_order_sequence", "fenced_epoch", "unknown_partition", "malformed"]
# Of a repeated commit: so often another session comes in between, at most.
_ATTEMPTS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One record batch inside an uploaded object.

    `max_timestamp` is Kafka's: milliseconds since the epoch, of the newest record; -1 for none. An idempotent
    producer's has its id and epoch, and the sequence of its first record.
    """

    partition_id: int
    n_records: int
    byte_offset: int
    byte_length: int
    max_timestamp: int
    producer_id: int | None = None
    producer_epoch: int | None = None
    base_sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """The object's id, and what became of its batches, in the order of the request."""

    object_id: int
    verdicts: list[Verdict]


def commit_object(
    conn: Connection,
    object_key: str,
    partition_ids: Sequence[int],
    n_records: Sequence[int],
    byte_offsets: Sequence[int],
    byte_lengths: Sequence[int],
    max_timestamps: Sequence[int],
) -> int:
    """Commit one object, all or nothing, one element per batch in every sequence; returns the object's id.

    The order of the sequences is the order of offsets within a partition. Repeating a commit with the same arguments
    returns the first id. On an autocommit connection the commit is durable when this returns; otherwise it is part
    of the caller's transaction.

    Its offsets are higher than those of all that was committed before its transaction wrote anything: that is before
    this call, unless the caller's transaction had written already.

    Raises InvalidCommitError, CommitTooLargeError (beyond 65,536 batches), CommitConflictError, CondemnedObjectError,
    UnknownPartitionError and ForeignClusterError; each leaves the database as it was.
    """
    arrays = (partition_ids, n_records, byte_offsets, byte_lengths, max_timestamps)
    (object_id,) = values(conn, "commit_object", (_key(object_key), *_arrays(object_key, arrays)))
    return int(object_id)


def commit_batches(conn: Connection, object_key: str, batches: Iterable[Batch]) -> Committed:
    """Commit what can be accepted of one object, and tell what became of each batch.

    As `commit_object`, but a batch that is malformed, of an unknown partition, or repeated, out of order or fenced for
    its producer harms none of the others. Where another session commits batches of the same producer at the same
    moment, this is repeated. Inside a transaction, which has to be repeated then, it raises SerializationFailure.

    Raises InvalidCommitError (without batches, for example), CommitTooLargeError, CommitConflictError,
    CondemnedObjectError and ForeignClusterError; each leaves the database as it was.
    """
    rows = list(batches)
    names = [field.name for field in fields(Batch)]
    try:
        if all(row.producer_id is None for row in rows):
            names = names[:-3]
        # The fields stand in the order of the arguments.
        # -1 is Kafka's for none.
        arrays = [[-1 if (value := getattr(row, name)) is None else value for row in rows] for name in names]
    except AttributeError as error:
        raise InvalidCommitError(f"object {object_key!r}: {error}. Pass batches as db.commit.Batch.") from None
    parameters = (_key(object_key), *_arrays(object_key, arrays), *[None] * (8 - len(arrays)))
    alone = conn.info.transaction_status == TransactionStatus.IDLE and conn.autocommit
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            return Committed(*values(conn, "commit_batches", parameters))
        except SerializationFailure:
            if not alone or attempt == _ATTEMPTS:
                raise
    raise AssertionError


def columns(batches: Iterable[Batch]) -> Iterable[list[int]]:
    """Batches without producers as the arrays of `commit_object`, in their order."""
    rows = list(batches)
    return ([getattr(row, field.name) for row in rows] for field in fields(Batch)[:5])


def _key(object_key: str) -> str:
    if not is_storable(object_key):
        raise InvalidCommitError(
            f"object {object_key!r}: the key is no text Postgres can store. Pass a str without NUL or lone surrogates."
        )
    return object_key


_KINDS: tuple[Callable[[Iterable[int]], Int4Array], ...] = (
    *(Int4Array, Int4Array, Int8Array, Int4Array, Int8Array),
    *(Int8Array, Int4Array, Int4Array),
)


def _arrays(object_key: str, arrays: Iterable[Sequence[int]]) -> list[Any]:
    try:
        return [kind(values) for kind, values in zip(_KINDS, arrays, strict=False)]
    except (ValueError, TypeError) as error:
        raise InvalidCommitError(
            f"object {object_key!r}: {error}. Pass integers that fit: 32 bits for partition ids, numbers of records, "
            f"byte lengths, epochs and sequences, 64 bits for byte offsets, timestamps and producer ids."
        ) from None
