"""Looks at the log from outside, to check it: nothing here is on a path of production."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg

from db.arrays import Int4Array, Int8Array
from db.fetch import FetchedBatch
from db.statements import run
from db.translate import domain_errors


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A partition's offsets, and what stands between the end offset known before and the present one."""

    partition_id: int
    start_offset: int
    end_offset: int
    new_records: int
    new_object_ids: tuple[int, ...]


def observe_heads(conn: psycopg.Connection[Any], known_end_offsets: Mapping[int, int]) -> list[Head]:
    """Heads of the partitions in `known_end_offsets`, all in one snapshot."""
    with domain_errors():
        # Planned each time: a plan kept from an empty log would scan a full one.
        rows = run(
            conn,
            "observe_heads",
            (Int4Array(known_end_offsets), Int8Array(known_end_offsets.values())),
            prepare=False,
        ).fetchall()
    return [
        Head(
            partition_id=row[0],
            start_offset=row[1],
            end_offset=row[2],
            new_records=row[3],
            new_object_ids=tuple(row[4]),
        )
        for row in rows
    ]


def read_log(conn: psycopg.Connection[Any], partition_id: int) -> list[FetchedBatch]:
    """Every batch of a partition by offset, straight from its runs and events."""
    with domain_errors():
        rows = run(conn, "read_log", (partition_id,), prepare=False).fetchall()
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


def find_objects(conn: psycopg.Connection[Any], prefix: str) -> dict[str, int]:
    """Ids of committed objects by key."""
    with domain_errors():
        return dict(run(conn, "find_objects", (prefix,)).fetchall())
