"""Objects that can go from storage: retention deleted the last of their batches.

A program that cleans up storage lists them, deletes the uploads, then forgets them here. After a crash in between they
are listed again, so deleting an upload that is gone must not be an error. Readers may still hold a batch that they
fetched before it expired: `older_than_seconds` is the time they are given.

Forgetting deletes the object's row, and with it the memory of its key: the same key can be committed again, as new
batches. So `older_than_seconds` must also be longer than any broker goes on repeating a commit, and keys should never
be reused.

Lock order: objects by ascending id.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from db.arrays import Int8Array
from db.statements import Connection, all_, run


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadObject:
    """An object none of whose batches is left, and since when."""

    id: int
    key: str
    dead_at: datetime


def list_dead_objects(
    conn: Connection, *, limit: int = 1_000, older_than_seconds: float = 3600.0, after_object_id: int = 0
) -> list[DeadObject]:
    """At most `limit` objects that died `older_than_seconds` ago or earlier, by id.

    Pass the last one's id as `after_object_id` to go past those that could not be deleted from storage.
    """
    if limit < 1 or older_than_seconds < 0:
        raise ValueError(
            f"dead objects: limit {limit}, older than {older_than_seconds:g} s: pass at least 1, and no negative time"
        )
    return all_(conn, DeadObject, "find_dead_objects", (after_object_id, limit, older_than_seconds))


def forget_dead_objects(conn: Connection, ids: Iterable[int]) -> int:
    """Forget objects that are deleted from storage; returns how many.

    Ids that are unknown, forgotten already or of objects with batches left are passed over.
    """
    return run(conn, "delete_dead_objects", (Int8Array(ids),)).rowcount
