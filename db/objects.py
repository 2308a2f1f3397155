"""Objects that can go from storage, and how far it is cleaned up.

An object is dead when retention has deleted the last of its batches, when none of them was accepted, or when its key is
condemned: an upload that nobody has committed. It is listed here, deleted from the store, and then forgotten; after a
crash in between it is listed again, so deleting an upload that is gone must not be an error. Readers may still hold a
batch that they fetched before it expired: `older_than_seconds` is the time they are given.

Forgetting deletes the object's row, and with it the memory of its key: the same key can be committed again, as new
batches. So `older_than_seconds` must also be longer than any broker goes on repeating a commit, and keys must never be
reused.

Commit and condemn insert the same unique key, so one of them wins and the other is told. Of a key that is condemned the
row stays like any dead object's: it refuses the commit that comes late.

Lock order: objects by ascending key where they are condemned, by ascending id where they are forgotten. Who takes dead
objects locks the first row of `collections`, and nothing else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from config.errors import InvalidCommitError
from db.arrays import Int8Array
from db.statements import Connection, all_, pipelined, rows, run
from db.translate import is_storable

# As objects_key_length: what is longer cannot be committed.
KEY_BYTES = 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadObject:
    """An object none of whose batches is left, and since when."""

    id: int
    key: str
    dead_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownObject:
    """An object, committed or condemned; `is_live` where it is committed and batches of it are left."""

    id: int
    key: str
    is_live: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconciliation:
    """Bucket and table are compared up to `key`, empty at the beginning. `found_key` is a committed object that was in
    the store, None before there was one.
    """

    id: int
    key: str
    found_key: str | None


def condemn(conn: Connection, keys: Iterable[str]) -> list[str]:
    """Condemn uploads that nobody has committed; returns the keys that are condemned now, in their order.

    A key that is missing in the answer is committed. Waits for a commit of one of the keys that is under way. At most
    10,000 keys at once. Raises InvalidCommitError and ForeignClusterError; each leaves the database as it was.
    """
    asked = list(keys)
    if wrong := [key for key in asked if not is_storable(key)]:
        raise InvalidCommitError(
            f"object {wrong[0]!r}: the key is no text Postgres can store. Pass a str without NUL or lone surrogates."
        )
    return [row.key for row in rows(conn, "condemn", (asked,))]


def list_dead_objects(
    conn: Connection, *, limit: int = 1_000, older_than_seconds: float = 3600.0, after_object_id: int = 0
) -> list[DeadObject]:
    """At most `limit` objects that died `older_than_seconds` ago or earlier, by id.

    Pass the last one's id as `after_object_id` to go on behind it, whether it could be deleted or not: to begin again
    passes over what was deleted before.
    """
    _check(limit, older_than_seconds)
    return all_(conn, DeadObject, "find_dead_objects", (after_object_id, limit, older_than_seconds))


def take_dead_objects(
    conn: Connection, *, limit: int, older_than_seconds: float, new_round: bool = False
) -> list[DeadObject]:
    """The next `limit` objects that died `older_than_seconds` ago or earlier; nobody else takes them in this round.

    A round goes once through all that is dead. With `new_round` another one begins, if the last one did so
    `older_than_seconds` ago: it finds what was taken and never deleted, and what a long transaction left behind the
    position. The connection must be in autocommit mode.
    """
    _check(limit, older_than_seconds)
    with pipelined(conn):
        run(conn, "lock_collections", prepare=True)
        return all_(conn, DeadObject, "take_dead_objects", (limit, older_than_seconds, new_round), prepare=True)


def give_back_dead_objects(conn: Connection, taken: Sequence[DeadObject]) -> None:
    """Put objects back that were taken and could not be deleted, so that the next turn takes them and not the next
    round. The connection must be in autocommit mode.
    """
    with pipelined(conn):
        run(conn, "lock_collections", prepare=True)
        run(conn, "give_back_dead_objects", (taken[0].dead_at, taken[0].id))


def forget_dead_objects(conn: Connection, ids: Iterable[int]) -> int:
    """Forget objects that are deleted from storage; returns how many.

    Ids that are unknown, forgotten already or of objects with batches left are passed over. A transaction of its own.
    """
    with pipelined(conn):
        done = run(conn, "delete_dead_objects", (Int8Array(ids),), prepare=True)
    return done.rowcount


def find_objects(conn: Connection, *, after_key: str, limit: int) -> list[KnownObject]:
    """The next `limit` objects after a key, in the order of their keys' bytes. The connection must be in autocommit
    mode.
    """
    _check(limit, 0)
    with pipelined(conn):
        return all_(conn, KnownObject, "find_objects", (after_key, limit), prepare=True)


def find_live_objects(conn: Connection, keys: Sequence[str]) -> list[KnownObject]:
    """Those of the keys that are committed and not dead, in no order. The connection must be in autocommit mode."""
    with pipelined(conn):
        return all_(conn, KnownObject, "find_live_objects", (list(keys),), prepare=True)


def read_reconciliation(conn: Connection) -> Reconciliation:
    """How far bucket and table are compared."""
    [found] = all_(conn, Reconciliation, "read_reconciliation")
    return found


def save_reconciliation(conn: Connection, begun: Reconciliation, key: str, found_key: str | None) -> None:
    """Remember how far a turn got that began at `begun`; of two at once the one that ends first counts."""
    run(conn, "save_reconciliation", (begun.id, key, found_key))


def _check(limit: int, older_than_seconds: float) -> None:
    if limit < 1 or older_than_seconds < 0:
        raise ValueError(
            f"dead objects: limit {limit}, older than {older_than_seconds:g} s: pass at least 1, and no negative time"
        )
