"""Collects what the check needs from the database, when the backlog is drained and nobody commits."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg

from db.fetch import FetchedBatch, fetch_batches
from db.topics import names_of
from tests.demo.check import Evidence, PartitionLog
from tests.demo.ledger import Attempt
from tests.demo.observers import Reader, Watcher
from tests.demo.storage import download
from tests.observe import find_objects, observe_heads, read_log

_BATCHES_A_FETCH = 500


def collect(
    conn: psycopg.Connection[Any],
    partition_ids: Sequence[int],
    key_prefix: str,
    objects: Path,
    attempts: Sequence[Attempt],
    watcher: Watcher,
    reader: Reader,
) -> Evidence:
    """Read the log and the objects of the run."""
    return Evidence(
        partitions=read_partitions(conn, partition_ids),
        objects=find_objects(conn, key_prefix),
        attempts=attempts,
        sightings=watcher.sightings,
        readings=reader.readings,
        load=lambda key: download(objects, key),
        looks=watcher.looks,
        fetched=reader.fetched,
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
