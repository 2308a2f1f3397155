"""What the database says: the log as it is stored, as it is fetched, and what is pending."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import class_row

from db.discover import sweep
from db.fetch import FetchedBatch, fetch_batches
from db.topics import names_of
from tests.demo.check import Evidence, PartitionLog
from tests.demo.ledger import Ledger, Outcome
from tests.demo.storage import download

_BATCHES_A_FETCH = 500

# Offsets of partitions in one snapshot, and the objects and records of the batches since the end offset that was known
# of each, where a run begins. Costs O(new batches).
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

# As the runs have them, also where they break the rules that a fetch relies on.
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
    with conn.cursor(row_factory=class_row(Head)) as cursor:
        # Planned each time: a plan kept from an empty log would scan a full one.
        return cursor.execute(
            _HEADS, (list(known_end_offsets), list(known_end_offsets.values())), prepare=False
        ).fetchall()


def read_log(conn: psycopg.Connection[Any], partition_id: int) -> list[FetchedBatch]:
    """Every batch of a partition by offset, straight from its runs and events."""
    with conn.cursor(row_factory=class_row(FetchedBatch)) as cursor:
        return cursor.execute(_LOG, (partition_id,), prepare=False).fetchall()


def find_objects(conn: psycopg.Connection[Any], prefix: str) -> dict[str, int]:
    """Ids of committed objects by key; those that are condemned have no content."""
    found = conn.execute("select key, id from tidemark.objects where key ^@ %s and content_hash <> ''", (prefix,))
    return dict(found.fetchall())


def backlog(conn: psycopg.Connection[Any], partition_ids: Collection[int] | None = None) -> int:
    """Pending events in these partitions, or in all."""
    return sum(p.events for p in sweep(conn) if partition_ids is None or p.partition_id in partition_ids)


def collect(
    conn: psycopg.Connection[Any],
    partition_ids: Sequence[int],
    ledger: Ledger,
    *,
    key_prefix: str = "",
    objects: Path | None = None,
    looks: int | None = None,
    fetched: int | None = None,
) -> Evidence:
    """All that is known when the backlog is drained and nobody commits.

    `objects` is where the producers uploaded to. `looks` and `fetched` are how often readers looked and how many
    batches they were given, where the ledger does not hold each.
    """
    return Evidence(
        partitions=read_partitions(conn, partition_ids),
        objects=find_objects(conn, key_prefix),
        # What was never concluded: its process was killed.
        attempts=[*ledger.attempts, *(replace(a, outcome=Outcome.UNKNOWN) for a in ledger.begun.values())],
        sightings=ledger.sightings,
        readings=ledger.readings,
        answers=ledger.answers,
        load=None if objects is None else lambda key: download(objects, key),
        looks=len(ledger.sightings) if looks is None else looks,
        fetched=sum(len(reading.batches) for reading in ledger.readings) if fetched is None else fetched,
    )


def read_partitions(conn: psycopg.Connection[Any], partition_ids: Sequence[int]) -> Mapping[int, PartitionLog]:
    """Heads and batches of partitions: what its runs have, and what a consumer gets from start to end."""
    names = names_of(conn, partition_ids)
    return {
        head.partition_id: PartitionLog(
            name="{}/{}".format(*names[head.partition_id]),
            start_offset=head.start_offset,
            end_offset=head.end_offset,
            batches=read_log(conn, head.partition_id),
            fetched=_consume(conn, head.partition_id, head.start_offset, head.end_offset),
        )
        for head in observe_heads(conn, dict.fromkeys(sorted(partition_ids), 0))
    }


def _consume(conn: psycopg.Connection[Any], partition_id: int, offset: int, end_offset: int) -> list[FetchedBatch]:
    """Fetch on and on, as far as it leads: a broken log need not lead to its end."""
    consumed: list[FetchedBatch] = []
    while offset < end_offset:
        page = fetch_batches(conn, partition_id, offset, max_batches=_BATCHES_A_FETCH)
        consumed += page
        reached = page[-1].start_offset + page[-1].n_records if page else offset
        if reached <= offset:
            break
        offset = reached
    return consumed
