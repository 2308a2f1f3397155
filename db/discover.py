"""Finds the partitions that have something to materialize.

Fan-out looks at the commits since the last one, and costs as much as there are of them. The sweep looks at every
partition, and finds what fan-out handed to a message that was lost.

Crash between finding and saving: the same commits are found again. Two at once: both find them. Either way a partition
is dispatched twice, which costs one empty transaction.

A full round of the sweep also settles transactions. Settled is one that was over when the round began and of which the
round met no pending event in any partition: what it committed has its offsets. So nobody needs to look for late
events of it any more, and passes that met only such transactions are deleted. It holds against passes that run beside
the round: one that still saw the transaction running has its partition locked since before, so the round, which sees
the partition as it was before that pass, meets the transaction's events there as pending.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from db.statements import Connection, pipelined, rows, run, values

# Batches of new commits that one statement adds up: half a second. With more, probing every partition is cheaper.
_BATCHES = 2_000_000
# Counting further costs more than it tells: a task can take ten such partitions.
_COUNT_LIMIT = 5_000
# Partitions and events per statement of the sweep: some ten milliseconds, also with a large backlog.
_SWEEP_PAGE = 1_000
_SWEEP_EVENTS = 100_000
# Passes deleted in one transaction.
_COLLECT = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Pending:
    """A partition and how many events wait in it (for fan-out: those of the new commits)."""

    partition_id: int
    events: int


@dataclass(frozen=True, slots=True)
class Committed:
    """What the commits since the last fan-out touched, up to `seen_tx` but for `in_flight`; not complete, and then
    without partitions, where there are more of them than a limit.
    """

    partitions: tuple[Pending, ...]
    seen_tx: int
    in_flight: list[int]
    commits: int
    complete: bool


def find_committed(conn: Connection, *, limit: int = 50_000) -> Committed:
    """Partitions of the commits that the last fan-out did not see, where these are fewer than `limit`."""
    state = values(conn, "read_fan_out")
    # Planned for the values at hand: a generic plan would expect a third of all commits to be new.
    *found, ids, events = values(conn, "find_committed", (*state, limit, _BATCHES), prepare=False)
    partitions = tuple(Pending(partition_id=i, events=e) for i, e in zip(ids, events, strict=True))
    return Committed(partitions, *found)


def save_fan_out(conn: Connection, found: Committed) -> None:
    """Remember that these commits are dispatched."""
    run(conn, "save_fan_out", (found.seen_tx, found.in_flight))


def sweep(conn: Connection) -> Iterator[Pending]:
    """Every partition with pending events, by id; some hundred partitions at a time.

    Reading it to the end is a full round, which settles transactions (see the module).
    """
    settled_tx, running, collected_tx = values(conn, "begin_sweep")
    unsettled = set(running)
    after = 0
    while page := _sweep_page(conn, after):
        for found in page:
            settled_tx = min(settled_tx, found.first_tx or settled_tx)
            unsettled.update(found.late or ())
            if found.events:
                yield Pending(partition_id=found.partition_id, events=found.events)
        after = page[-1].partition_id
    _settle(conn, settled_tx, sorted(tx for tx in unsettled if tx < settled_tx), collected_tx)


def _sweep_page(conn: Connection, after: int) -> list[Any]:
    # Passes pile up while a transaction is open, and a plan for a few would read all for each partition.
    with pipelined(conn):
        return rows(conn, "find_pending", (after, _SWEEP_PAGE, _COUNT_LIMIT, _SWEEP_EVENTS), prepare=True)


def _settle(conn: Connection, settled_tx: int, unsettled: list[int], collected_tx: int) -> None:
    floor = min(settled_tx, *unsettled) if unsettled else settled_tx
    deleted = _COLLECT
    while deleted == _COLLECT:
        with pipelined(conn):
            deleted, last_tx = values(conn, "collect_passes", (collected_tx, floor, _COLLECT), prepare=True)
        collected_tx = last_tx or collected_tx
    run(conn, "save_sweep", (settled_tx, unsettled, collected_tx))
