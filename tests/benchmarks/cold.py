"""The cold path as jobs of a crew: ours and the practical limit, on the same backlog."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import psycopg

from config.settings import DEFAULT_STRATEGY, Strategy
from db.materialize import materialize
from tests.benchmarks.crew import Crew, Job
from tests.benchmarks.measure import Sample
from tests.benchmarks.tables import fresh, load, wal_position


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
    # All there are.
    partitions: int


def shares(backlog: Backlog, clients: int) -> list[Share]:
    bounds = [backlog.partitions * n // clients for n in range(clients + 1)]
    return [
        Share(
            first=low + 1,
            last=high,
            group=backlog.group,
            events_per_partition=backlog.events_per_partition,
            partitions=backlog.partitions,
        )
        for low, high in pairwise(bounds)
    ]


def drain(conn: psycopg.Connection[Any], share: Share, strategy: Strategy = DEFAULT_STRATEGY) -> int:
    """Materialize until nothing is left, one group of partitions after the other, as a worker does."""
    events = 0
    for first in range(share.first, share.last + 1, share.group):
        left: tuple[int, ...] = tuple(range(first, min(first + share.group, share.last + 1)))
        while left:
            done = materialize(conn, left, events_per_partition=share.events_per_partition, strategy=strategy)
            events += done.events_processed
            left = done.backlog_partition_ids
    return events


# Neighbours are told by their numbers in the backlog, which nobody has in life. So no order is asked for, and the
# planner reads as it likes. The offsets are unique, and as wide as ours.
INSERT_RUNS = """
with placed as (
    insert into bench_limit.runs
        (start_offset, end_offset, end_bytes, max_timestamp, first_tx, last_tx, partition_id, batches)
    select min(e.id) * 1000, min(e.id) * 1000 + sum(e.n_records), sum(e.byte_length), max(e.max_timestamp), min(e.tx),
           max(e.tx), e.partition_id, count(*)
    from tidemark.record_batch_events e
    where e.partition_id between %s and %s
    group by e.partition_id, e.byte_offset / (%s::bigint * 64 * 1000)
    returning batches
)
select coalesce(sum(batches), 0)::int from placed
"""


def summarize(conn: psycopg.Connection[Any], share: Share) -> int:
    """The practical limit: read each event once and insert a row for every 64 of a partition, in one statement."""
    row = conn.execute(INSERT_RUNS, (share.first, share.last, share.partitions)).fetchone()
    assert row is not None
    return int(row[0])


def logged(conn: psycopg.Connection[Any], crew: Crew, job: Job, work: Sequence[Any]) -> Sample:
    """A run, with what it wrote to the log; nobody else may write."""
    before = wal_position(conn)
    sample = crew.run(job, work)
    return replace(sample, log_bytes=wal_position(conn) - before)


def run_cold(conn: psycopg.Connection[Any], crew: Crew, backlog: Backlog, *, limit: bool, history: int = 0) -> Sample:
    """One measurement on fresh tables, or after `history` batches that have been materialized."""
    fresh(conn, backlog.partitions)
    if history:
        before = replace(backlog, events_each=history // backlog.partitions)
        load(conn, before.partitions, before.events_each)
        drain(conn, shares(before, 1)[0])
        conn.execute("vacuum analyze tidemark.record_batch_events, tidemark.runs")
        conn.execute("checkpoint")
    load(conn, backlog.partitions, backlog.events_each)
    sample = logged(conn, crew, summarize if limit else drain, shares(backlog, crew.size))
    if sample.units != backlog.events:
        raise RuntimeError(f"{sample.units} of {backlog.events} events were taken")
    return sample
