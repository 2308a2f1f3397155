"""The seed's system: create it, load it, drain it."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psycopg
from psycopg import RawCursor, errors

# `bare`: primary keys alone. `page`: the page's indexes. `partial`: only pending events, in the order they are taken.
Indexes = Literal["bare", "page", "partial"]
# `materialize`: the six steps. `aware`: the page's partition-aware form of them.
Form = Literal["materialize", "aware"]

_COMMIT_ROWS = 1500


@cache
def _sql(name: str) -> bytes:
    return Path(__file__).with_name(f"{name}.sql").read_bytes()


def create(
    conn: psycopg.Connection[Any], topics: int, partitions: int, *, indexes: Indexes, fillfactor: int = 100
) -> None:
    """Fresh tables with `topics` topics of `partitions` partitions each.

    A fillfactor below 100 makes room for new versions beside the old ones; in-place updates still need that no index
    holds the flag, which is so without indexes only.
    """
    conn.execute(_sql("schema"))
    if indexes != "bare":
        conn.execute(_sql({"page": "indexes", "partial": "partial"}[indexes]))
    conn.execute(f"alter table seed.record_batch_events set (fillfactor = {fillfactor})".encode())
    conn.execute("insert into seed.topics (name) select 'topic-' || g from generate_series(1, %s) g", (topics,))
    conn.execute(
        "insert into seed.topic_partitions (topic_id, partition, start_offset, end_offset) "
        "select t.id, p, 0, 0 from seed.topics t, generate_series(0, %s - 1) p",
        (partitions,),
    )
    conn.execute("vacuum analyze seed.topic_partitions")
    conn.execute("checkpoint")


def load(
    conn: psycopg.Connection[Any], partitions: int, events: int, records: tuple[int, int], *, analyze: bool = True
) -> None:
    """Commit `events` events: topics in turn, partitions and numbers of records at random, from the same seed."""
    conn.execute("set synchronous_commit = off")
    conn.execute("select setseed(0.42)")
    for first in range(0, events, _COMMIT_ROWS):
        conn.execute(
            """
            with topics as (select array_agg(id) as ids from seed.topics)
            insert into seed.record_batch_events (topic_id, partition, n_records, s3_key)
            select t.ids[g %% cardinality(t.ids) + 1], floor(random() * %s)::int,
                   %s + floor(random() * (%s - %s + 1))::int, 'bucket/object-' || %s::int
            from topics t, generate_series(%s::int, %s::int) g
            """,
            (partitions, records[0], records[1], records[0], first, first, min(first + _COMMIT_ROWS, events) - 1),
        )
    conn.execute("reset synchronous_commit")
    if analyze:
        conn.execute("analyze seed.record_batch_events")


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedShare:
    """What each of several workers does: drain everything, `batch` events a transaction."""

    batch: int
    form: Form = "materialize"


def drain(conn: psycopg.Connection[Any], share: SeedShare) -> int:
    """Materialize until nothing is left; returns the number of events.

    Prepared after the first executions. Deadlocks are repeated at once: the seed's retry, without its pause.
    """
    events = 0
    while True:
        try:
            done = RawCursor(conn).execute(_sql(share.form), (share.batch,)).rowcount
        except errors.DeadlockDetected:
            continue
        if done == 0:
            return events
        events += done
