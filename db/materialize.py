"""The cold path: gives committed events their permanent offsets.

Invariants: the runs of a partition are contiguous in every snapshot; every committed event is in one run; commits keep
their real-time order.

How. The newest run of a partition is its end and its cursor: a position in the order of the events, and the
transactions that were still running below it. Pending is what lies beyond the position, and whatever those
transactions turn out to have committed (`db/sql/functions/cursors.sql`). Ids alone would lose events, because a lower
one can become visible later. A pass inserts runs and changes nothing.

Lock order: topic_partitions by ascending id, in a statement of its own before anything is read.

After a crash at any step nothing is left behind: the runs of a pass appear in one transaction.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import Any, Literal, Self

from psycopg.pq import TransactionStatus
from psycopg.rows import class_row

from config.errors import UnknownPartitionError
from config.settings import DEFAULT_STRATEGY, STRATEGIES, Strategy
from db.arrays import Int4Array
from db.statements import Connection, pipelined, run, values

# Heap tuple (32 bytes header with the bitmap of nulls, 64 to 80 of columns, 4 of line pointer) and its entry in the
# primary key (8 bytes header, 12 of columns, padded to 24, 4 of line pointer) of one row of runs.
RUN_BYTES = 112 + 28
# Of metrics put together.
_SUMMED = (
    *("processing_time_ms", "events_processed", "lock_wait_time_ms", "transaction_size_bytes", "records", "log_bytes"),
    *("transactions", "errors", "stuck_partition_ids"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moved:
    """What one partition got in a transaction; `has_more` where events were left."""

    partition_id: int
    events: int
    records: int
    log_bytes: int
    runs: int
    has_more: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MaterializationMetrics:
    """What one or several materializing transactions did.

    The first six are the seed's. `transaction_size_bytes` is what the transaction added to `runs` and its index;
    `error_rate` is the share of attempts that failed and were repeated. `batch_events` is how many events the last
    transaction would have taken at most.
    """

    processing_time_ms: float = 0.0
    events_processed: int = 0
    partitions_processed: int = 0
    lock_wait_time_ms: float = 0.0
    transaction_size_bytes: int = 0
    error_rate: float = 0.0
    records: int = 0
    log_bytes: int = 0
    transactions: int = 0
    errors: int = 0
    # Partitions that had events left when the transaction ended.
    backlog_partition_ids: tuple[int, ...] = ()
    # Partitions that were passed over because somebody else has them locked.
    busy_partition_ids: tuple[int, ...] = ()
    # Partitions whose transaction fails, also alone.
    stuck_partition_ids: tuple[int, ...] = ()
    strategy: Strategy | Literal["several"] = DEFAULT_STRATEGY
    batch_events: int = 0
    # One transaction's share of each partition; not kept in sums.
    moved: tuple[Moved, ...] = ()

    def __add__(self, other: Self) -> Self:
        """Both together; the backlog and what was busy are the later one's."""
        total = {name: getattr(self, name) + getattr(other, name) for name in _SUMMED}
        attempts = total["transactions"] + total["errors"]
        return replace(
            other,
            **total,
            partitions_processed=max(self.partitions_processed, other.partitions_processed),
            error_rate=total["errors"] / attempts if attempts else 0.0,
            strategy=other.strategy if other.transactions else self.strategy,
            batch_events=other.batch_events or self.batch_events,
            moved=(),
        )

    def beside(self, other: Self) -> Self:
        """Both together, of different partitions."""
        return replace(
            self + other,
            partitions_processed=self.partitions_processed + other.partitions_processed,
            backlog_partition_ids=self.backlog_partition_ids + other.backlog_partition_ids,
            busy_partition_ids=self.busy_partition_ids + other.busy_partition_ids,
            strategy=self.strategy if self.strategy == other.strategy else "several",
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: times rounded to microseconds, lists of partitions as their numbers."""
        values = asdict(self)
        del values["moved"]
        for name in ("backlog", "busy", "stuck"):
            values[f"{name}_partitions"] = len(values.pop(f"{name}_partition_ids"))
        for name in ("processing_time_ms", "lock_wait_time_ms", "error_rate"):
            values[name] = round(values[name], 3)
        return values


def materialize(
    conn: Connection,
    partition_ids: Iterable[int],
    *,
    events_per_partition: int = 20_000,
    strategy: Strategy = DEFAULT_STRATEGY,
    wait: bool = True,
) -> MaterializationMetrics:
    """Materialize pending events of these partitions, in one transaction.

    At most `events_per_partition` of each; partitions with more are in `backlog_partition_ids`. `strategy` changes the
    speed and nothing else. What is reported is durable: `synchronous_commit` is on for the transaction where the
    connection has less.

    Waits for partitions that others have locked as long as the connection's `lock_timeout`; without `wait` it passes
    them over, and they are in `busy_partition_ids`.

    Raises ValueError when a transaction is open on the connection already, UnknownPartitionError for an id that does
    not exist, ForeignClusterError in a restored database; each changes nothing.
    """
    ids = sorted(set(partition_ids))
    if not ids or events_per_partition < 1:
        raise ValueError(
            f"materialize {len(ids)} partitions with {events_per_partition} events each: pass at least one of both"
        )
    if strategy not in STRATEGIES:
        raise ValueError(f"materialize by {strategy!r}: pass one of {', '.join(STRATEGIES)}")
    if conn.info.transaction_status != TransactionStatus.IDLE:
        # No snapshot lists its own transaction: the cursor would pass it, and what it commits later would be lost.
        raise ValueError("materialize needs a transaction of its own: commit or roll back the one that is open")
    if ids[0] < 0 or ids[-1] >= 2**31:
        raise UnknownPartitionError(f"partition id {ids[0] if ids[0] < 0 else ids[-1]} does not exist")
    start = perf_counter()
    # Two round trips: up to the answers of the statements, and the commit. Small transactions are little else.
    with pipelined(conn):
        lock = "lock_partitions" if wait else "lock_free_partitions"
        locking = run(conn, lock, (Int4Array(ids),), prepare=True)
        placing = run(conn, f"place_{strategy}", (events_per_partition,), prepare=True, row_factory=class_row(Moved))
        locked, waited, _ = locking.fetchall()[0]
        missing = sorted(set(ids) - set(locked))
        # Those of a topic that was deleted meanwhile need nothing more; those that others have locked are there.
        known = values(conn, "known_partitions", (Int4Array(missing),))[0] if missing else ()
        if unknown := sorted(set(missing) - set(known)):
            raise UnknownPartitionError(
                f"partition id {unknown[0]} does not exist ({len(unknown)} of {len(ids)} asked for). "
                f"Read the ids of a topic's partitions with tidemark.partition_ids(topic)."
            )
        moved: tuple[Moved, ...] = tuple(placing.fetchall())
    return MaterializationMetrics(
        processing_time_ms=(perf_counter() - start) * 1000,
        events_processed=sum(m.events for m in moved),
        partitions_processed=len(moved),
        lock_wait_time_ms=waited * 1000,
        transaction_size_bytes=sum(m.runs for m in moved) * RUN_BYTES,
        records=sum(m.records for m in moved),
        log_bytes=sum(m.log_bytes for m in moved),
        transactions=1,
        backlog_partition_ids=tuple(sorted(m.partition_id for m in moved if m.has_more)),
        busy_partition_ids=() if wait else tuple(missing),
        strategy=strategy,
        batch_events=events_per_partition * len(ids),
        moved=moved,
    )


def ages_of_run(conn: Connection, partition_id: int, newer: int) -> list[float]:
    """Seconds since the commit of each event in the partition's run that has `newer` ones after it."""
    return [row[0] for row in run(conn, "ages_of_run", (partition_id, newer), prepare=True)]
