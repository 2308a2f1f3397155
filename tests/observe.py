"""Looks at the log from outside, to check it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import class_row

from db.fetch import FetchedBatch

# The objects and records of the batches since the end offset known before, where a run begins. Costs O(new batches).
_HEADS = """
    select p.partition_id, p.start_offset, p.end_offset, n.new_records, n.new_object_ids
    from unnest(%s::int[], %s::bigint[]) known(id, end_offset)
    join tidemark.named_partitions p on p.partition_id = known.id
    cross join lateral (
        select coalesce(sum(b.n_records), 0)::bigint as new_records,
               coalesce(array_agg(b.object_id), '{}') as new_object_ids
        from tidemark.record_batches b
        where b.partition_id = known.id and b.run_start_offset >= known.end_offset
    ) n
"""
# Also where the runs break the rules that a fetch relies on.
_LOG = """
    select b.start_offset, b.n_records, coalesce(b.object_key, format('(no object %%s)', b.object_id)) as object_key,
           b.byte_offset, b.byte_length, b.max_timestamp_ms as max_timestamp
    from tidemark.record_batches b
    where b.partition_id = %s
    order by b.start_offset
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A partition's offsets, and what stands between the end offset known before and the present one."""

    partition_id: int
    start_offset: int
    end_offset: int
    new_records: int
    new_object_ids: list[int]


def observe_heads(conn: psycopg.Connection[Any], known_end_offsets: Mapping[int, int]) -> list[Head]:
    """Heads of the partitions in `known_end_offsets`, all in one snapshot."""
    parameters = (list(known_end_offsets), list(known_end_offsets.values()))
    # Planned each time: a plan kept from an empty log would scan a full one.
    return conn.cursor(row_factory=class_row(Head)).execute(_HEADS, parameters, prepare=False).fetchall()


def read_log(conn: psycopg.Connection[Any], partition_id: int) -> list[FetchedBatch]:
    """Every batch of a partition by offset, straight from its runs and events."""
    return conn.cursor(row_factory=class_row(FetchedBatch)).execute(_LOG, (partition_id,), prepare=False).fetchall()


def find_objects(conn: psycopg.Connection[Any], prefix: str) -> dict[str, int]:
    """Ids of committed objects by key."""
    return dict(conn.execute("select o.key, o.id from tidemark.objects o where o.key ^@ %s", (prefix,)).fetchall())
