"""The numbers of the live view, from the ledgers and the watcher."""

import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tests.demo.ledger import Attempt, Ledger, LedgerTail, Outcome
from tests.demo.observers import Watcher

# Rates and lags shown are those of the last seconds.
_WINDOW_SECONDS = 3.0
# A batch can be seen before its producer has noted the commit; what is not noted by then never will be.
_PATIENCE_SECONDS = 10.0
_PERCENT = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What there is to show at one moment; lags are None while nothing arrived."""

    committed: int
    materialized: int
    committed_rate: float
    materialized_rate: float
    backlog: int
    lag_p50: float | None
    lag_p99: float | None
    end_offsets: Mapping[str, Sequence[int]]


class Meter:
    """Follows a run, and gathers in `ledger` what the producers have written down."""

    def __init__(
        self, files: LedgerTail, ledger: Ledger, watcher: Watcher, topics: Mapping[str, Sequence[int]]
    ) -> None:
        self._files = files
        self._ledger = ledger
        self._watcher = watcher
        self._topics = topics
        self._returned: dict[int, float] = {}
        self._lags: list[float] = []
        self._recent: deque[tuple[float, float]] = deque()
        self._totals: deque[tuple[float, int, int]] = deque()

    def begin(self) -> None:
        """Forget the lags so far: those of programs that were starting."""
        self._watcher.arrivals.clear()

    def read_ledgers(self) -> None:
        """Take in what the producers have noted."""
        for record in self._files.read():
            self._ledger.write(record)
            if isinstance(record, Attempt) and record.outcome is Outcome.COMMITTED and record.object_id is not None:
                known = self._returned.get(record.object_id, record.returned)
                self._returned[record.object_id] = min(record.returned, known)

    def read(self, backlog: int) -> Figures:
        """The figures now; `backlog` is the database's own count."""
        self.read_ledgers()
        now = time.monotonic()
        self._sample(now)
        self._totals.append((now, len(self._ledger.sent), self._watcher.materialized))
        while self._totals[0][0] < now - _WINDOW_SECONDS and len(self._totals) > 1:
            self._totals.popleft()
        since, committed, materialized = self._totals[0]
        elapsed = max(now - since, 1e-9)
        while self._recent and self._recent[0][0] < now - _WINDOW_SECONDS:
            self._recent.popleft()
        p50, p99 = percentiles([lag for _, lag in self._recent])
        ends = self._watcher.end_offsets
        return Figures(
            committed=len(self._ledger.sent),
            materialized=self._watcher.materialized,
            committed_rate=(len(self._ledger.sent) - committed) / elapsed,
            materialized_rate=(self._watcher.materialized - materialized) / elapsed,
            backlog=backlog,
            lag_p50=p50,
            lag_p99=p99,
            end_offsets={topic: [ends[i] for i in ids] for topic, ids in self._topics.items()},
        )

    def totals(self, seconds: float) -> Figures:
        """The figures of the whole run, when the backlog is drained; rates are means over the time of producing."""
        now = self.read(backlog=0)
        p50, p99 = percentiles(self._lags)
        return replace(
            now,
            committed_rate=now.committed / seconds,
            materialized_rate=now.materialized / seconds,
            lag_p50=p50,
            lag_p99=p99,
        )

    def _sample(self, now: float) -> None:
        arrivals = self._watcher.arrivals
        while arrivals:
            arrival = arrivals[0]
            known = [self._returned[i] for i in arrival.object_ids if i in self._returned]
            if len(known) < len(arrival.object_ids) and arrival.seen > now - _PATIENCE_SECONDS:
                return
            arrivals.popleft()
            for returned in known:
                lag = max(0.0, arrival.seen - returned)
                self._lags.append(lag)
                self._recent.append((arrival.seen, lag))


def percentiles(values: Sequence[float]) -> tuple[float | None, float | None]:
    """p50 and p99."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (None, None)
    cuts = statistics.quantiles(values, n=_PERCENT, method="inclusive")
    return cuts[49], cuts[98]
