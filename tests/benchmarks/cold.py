"""The cold path as jobs of a crew: ours and the practical limit, on the same backlog."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psycopg

from db.materialize import materialize
from tests.benchmarks.crew import Crew
from tests.benchmarks.measure import Sample
from tests.benchmarks.tables import fresh, load


@dataclass(frozen=True, kw_only=True, slots=True)
class Backlog:
    """`events_each` events in each of the partitions 1 to `partitions`, taken `group` partitions a transaction."""

    partitions: int
    events_each: int
    group: int
    events_per_partition: int = 20_000

    @property
    def events(self) -> int:
        return self.partitions * self.events_each


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one of several clients takes of a backlog: partitions `first` to `last`."""

    first: int
    last: int
    group: int
    events_per_partition: int


def shares(backlog: Backlog, clients: int) -> list[Share]:
    bounds = [backlog.partitions * n // clients for n in range(clients + 1)]
    return [
        Share(first=low + 1, last=high, group=backlog.group, events_per_partition=backlog.events_per_partition)
        for low, high in pairwise(bounds)
    ]


def drain(conn: psycopg.Connection[Any], share: Share) -> int:
    """Materialize until nothing is left, one group of partitions after the other, as a worker does."""
    events = 0
    for first in range(share.first, share.last + 1, share.group):
        left: tuple[int, ...] = tuple(range(first, min(first + share.group, share.last + 1)))
        while left:
            done = materialize(conn, left, events_per_partition=share.events_per_partition)
            events += done.events_processed
            left = done.backlog_partition_ids
    return events


# No order is asked for, so the planner reads as it likes. A batch's offset is its event's id times 1,000: unique, and
# as wide as ours.
COPY_ALL = """
insert into bench_limit.batches
    (start_offset, object_id, byte_offset, max_timestamp, partition_id, n_records, byte_length)
select e.id * 1000, e.object_id, e.byte_offset, e.max_timestamp, e.partition_id, e.n_records, e.byte_length
from tidemark.record_batch_events e
where e.partition_id between %s and %s
"""


def copy(conn: psycopg.Connection[Any], share: Share) -> int:
    """The practical limit: the same rows into a table like ours, in one statement."""
    return conn.execute(COPY_ALL, (share.first, share.last)).rowcount


def run_cold(conn: psycopg.Connection[Any], crew: Crew, backlog: Backlog, *, limit: bool) -> Sample:
    """One measurement on fresh tables."""
    fresh(conn, backlog.partitions)
    load(conn, backlog.partitions, backlog.events_each)
    sample = crew.run(copy if limit else drain, shares(backlog, crew.size))
    if sample.units != backlog.events:
        raise RuntimeError(f"{sample.units} of {backlog.events} events were taken")
    return sample
