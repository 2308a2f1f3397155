"""Whether a candidate strategy is faster: sums that the workers keep in Redis, and what follows from them.

The sides of a task are groups of as many partitions, see `tasks.rollout.split`, with more or less in them. Smaller
transactions cost more per event whatever the strategy. So like is compared with like: transactions are sorted into
cells by their numbers of events and of partitions (powers of four), and within a cell the logarithm of the time is
compared by analysis of covariance, with the logarithm of the events as the covariate. The cells' differences are
averaged with the weights n1 n2 / (n1 + n2), which is what a common difference would be estimated with; their
variances are each side's own (Welch), the degrees of freedom Satterthwaite's. The result is a ratio of times.

What it assumes: that a cell's transactions are independent. Those of one minute share disk and neighbours, as the two
sides do; those of one partition share its shape. So the interval is a 99 % one, and with a handful of
partitions on a side it says more about them than about the strategy.

Bounded: six sums for each of at most 13 by 8 cells, pair of strategies and side; only while a candidate is set.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, inf, log, sqrt
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal

from db.materialize import MaterializationMetrics
from tasks import metrics
from tasks.rollout import Side

if TYPE_CHECKING:
    from redis import Redis

    from tasks.app import TidemarkApp

_NAME = "compare"
_ALL = "all"
# Redis adds integers exactly; so logarithms are kept in millionths.
_SCALE = 1_000_000
_LARGEST_EVENTS, _LARGEST_PARTITIONS = 12, 7

# Fewer say little about a variance.
CELL_AT_LEAST = 5
SIDE_AT_LEAST = 30

Verdict = Literal["real", "not shown", "too few transactions"]


# --- In the worker


def materialized(app: "TidemarkApp", side: Side, done: MaterializationMetrics) -> None:
    """Count a transaction of a side that is compared."""
    if not side.compared:
        return
    pair = _pair(app)

    def add(cell: str, **amounts: float) -> None:
        for name, amount in amounts.items():
            app.figures.add(_NAME, pair, side.strategy, cell, name, amount=round(amount))

    events, wait = done.events_processed, done.lock_wait_time_ms
    worked = max(done.processing_time_ms - wait, 0.001)
    add(_ALL, n=1, wait=wait * 1e3, wait_wait=wait * wait * 1e3)
    if events == 0:
        # It found nothing: no time per event.
        add(_ALL, empty=1)
        return
    add(
        _ALL,
        events=events, micros=worked * 1e3,
        events_events=events * events, events_ms=events * worked * 1e3, ms_ms=worked * worked * 1e3,
    )  # fmt: skip
    x, y = log(events), log(worked * 1e3)
    products = {"x": x, "y": y, "xx": x * x, "xy": x * y, "yy": y * y}
    cell = f"{_class(events, _LARGEST_EVENTS)}:{_class(done.partitions_processed, _LARGEST_PARTITIONS)}"
    add(cell, n=1, **{name: value * _SCALE for name, value in products.items()})


def failed(app: "TidemarkApp", side: Side) -> None:
    """Count a failed attempt of a side that is compared."""
    if side.compared:
        app.figures.add(_NAME, _pair(app), side.strategy, _ALL, "errors")


def _pair(app: "TidemarkApp") -> str:
    return f"{app.settings.strategy}>{app.settings.candidate}"


def _class(value: int, largest: int) -> int:
    return min((max(value, 1).bit_length() - 1) // 2, largest)


# --- Reading


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A value and the interval it is in, with the confidence asked for."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        return {name: _finite(getattr(self, name)) for name in self.__slots__}


@dataclass(frozen=True, kw_only=True, slots=True)
class SideFigures:
    """What one strategy did. Times leave out lock waits, which stand apart."""

    strategy: str
    transactions: int
    empty: int
    events: int
    errors: int
    seconds: float
    micros_per_event: Estimate | None
    lock_wait_ms: Estimate | None
    error_rate: Estimate | None

    @property
    def events_per_second(self) -> float:
        return self.events / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        estimates = {"micros_per_event", "lock_wait_ms", "error_rate"}
        found = {name: getattr(self, name) for name in self.__slots__}
        for name in estimates:
            found[name] = found[name] and found[name].as_dict()
        return found | {"events_per_second": self.events_per_second}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two sides; `time_ratio` is the candidate's time by the current one's, for transactions alike."""

    current: SideFigures
    candidate: SideFigures
    confidence: float
    time_ratio: Estimate | None
    lock_wait_difference_ms: Estimate | None
    # Transactions of the current side and of the candidate that had something alike on the other one.
    compared: tuple[int, int]

    @property
    def verdict(self) -> Verdict:
        """Whether the difference of times is real."""
        if self.time_ratio is None or min(self.compared) < SIDE_AT_LEAST:
            return "too few transactions"
        return "not shown" if self.time_ratio.low <= 1 <= self.time_ratio.high else "real"

    def as_dict(self) -> dict[str, Any]:
        return {
            "current": self.current.as_dict(),
            "candidate": self.candidate.as_dict(),
            "confidence": self.confidence,
            "compared": list(self.compared),
            "time_ratio": self.time_ratio and self.time_ratio.as_dict(),
            "lock_wait_difference_ms": self.lock_wait_difference_ms and self.lock_wait_difference_ms.as_dict(),
            "verdict": self.verdict,
        }


def read(redis: "Redis", *, confidence: float = 0.99) -> list[Comparison]:
    """Every pair of strategies the workers have figures of."""
    pairs: dict[str, dict[str, dict[str, dict[str, int]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for field, value in metrics.read(redis).items():
        name, *labels = field.split("|")
        if name == _NAME:
            pair, strategy, cell, amount = labels
            pairs[pair][strategy][cell][amount] = int(value)
    found = []
    for pair, sides in sorted(pairs.items()):
        current, candidate = pair.split(">")
        found.append(compare(current, candidate, sides[current], sides[candidate], confidence=confidence))
    return found


def forget(redis: "Redis") -> None:
    """Start over: what was compared so far is dropped, and no other figure."""
    fields = [field for field in metrics.read(redis) if field.startswith(f"{_NAME}|")]
    if fields:
        redis.hdel(metrics.KEY, *fields)


# --- Statistics

Sums = Mapping[str, int]


def compare(
    current: str,
    candidate: str,
    current_cells: Mapping[str, Sums],
    candidate_cells: Mapping[str, Sums],
    *,
    confidence: float = 0.99,
) -> Comparison:
    """Compare two strategies by their sums, cell by cell."""
    ratio, compared = _time_ratio(current_cells, candidate_cells, confidence)
    ours, theirs = current_cells.get(_ALL, {}), candidate_cells.get(_ALL, {})
    return Comparison(
        current=_side(current, ours, confidence),
        candidate=_side(candidate, theirs, confidence),
        confidence=confidence,
        time_ratio=ratio,
        lock_wait_difference_ms=_difference(_wait(theirs), _wait(ours), confidence),
        compared=compared,
    )


@dataclass(frozen=True, slots=True)
class _Moments:
    """A cell's sums, about their means."""

    n: int
    x: float
    y: float
    sxx: float
    sxy: float
    syy: float

    @classmethod
    def of(cls, sums: Sums) -> "_Moments":
        n = sums.get("n", 0)
        if n == 0:
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        x, y, xx, xy, yy = (sums.get(name, 0) / _SCALE for name in ("x", "y", "xx", "xy", "yy"))
        # What is left of a sum of squares that are all alike is rounding.
        return cls(n, x / n, y / n, max(xx - x * x / n, 0.0), xy - x * y / n, max(yy - y * y / n, 0.0))

    def residual(self, slope: float) -> float:
        """Variance about a line of this slope."""
        return max(self.syy - 2 * slope * self.sxy + slope * slope * self.sxx, 0.0) / (self.n - 1)


_ALIKE = 1e-3


def _time_ratio(
    current: Mapping[str, Sums], candidate: Mapping[str, Sums], confidence: float
) -> tuple[Estimate | None, tuple[int, int]]:
    weights = difference = variance = doubt = 0.0
    n_current = n_candidate = 0
    for cell in current.keys() & candidate.keys() - {_ALL}:
        a, b = _Moments.of(current[cell]), _Moments.of(candidate[cell])
        if min(a.n, b.n) < CELL_AT_LEAST:
            continue
        apart, sxx = b.x - a.x, a.sxx + b.sxx
        if sxx > _ALIKE:
            slope = (a.sxy + b.sxy) / sxx
        elif abs(apart) < _ALIKE:
            slope = 0.0
        else:
            # All of one size here, all of another there: nothing tells size from strategy.
            continue
        weight = a.n * b.n / (a.n + b.n)
        own = a.residual(slope) / a.n, b.residual(slope) / b.n
        # The slope is an estimate, too; what it corrects for is known as well as it is.
        both = ((a.n - 1) * a.residual(slope) + (b.n - 1) * b.residual(slope)) / (a.n + b.n - 2)
        of_slope = apart * apart * both / sxx if sxx > _ALIKE else 0.0
        weights += weight
        difference += weight * (b.y - a.y - slope * apart)
        variance += weight**2 * (sum(own) + of_slope)
        doubt += weight**4 * (own[0] ** 2 / (a.n - 1) + (own[1] + of_slope) ** 2 / (b.n - 1))
        n_current, n_candidate = n_current + a.n, n_candidate + b.n
    if weights == 0:
        return None, (0, 0)
    difference /= weights
    freedom = variance**2 / doubt if doubt > 0 else inf
    margin = t_quantile((1 + confidence) / 2, freedom) * sqrt(variance) / weights
    found = Estimate(value=exp(difference), low=exp(difference - margin), high=exp(difference + margin))
    return found, (n_current, n_candidate)


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t by the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5); within 1 % from 5 degrees on."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _side(strategy: str, sums: Sums, confidence: float) -> SideFigures:
    n, errors = sums.get("n", 0), sums.get("errors", 0)
    mean, variance, count = _wait(sums)
    margin = t_quantile((1 + confidence) / 2, count - 1) * sqrt(variance) if count > 1 else inf
    return SideFigures(
        strategy=strategy,
        transactions=n,
        empty=sums.get("empty", 0),
        events=sums.get("events", 0),
        errors=errors,
        seconds=sums.get("micros", 0) / 1e6,
        micros_per_event=_per_event(sums, confidence),
        lock_wait_ms=Estimate(value=mean, low=max(mean - margin, 0.0), high=mean + margin) if n else None,
        error_rate=_share(errors, n + errors, confidence),
    )


def _per_event(sums: Sums, confidence: float) -> Estimate | None:
    """Time by events, a ratio of two means; its variance by linearization (Cochran, Sampling Techniques, ch. 6)."""
    n, events = sums.get("n", 0) - sums.get("empty", 0), sums.get("events", 0)
    if n == 0 or events == 0:
        return None
    ratio = sums.get("micros", 0) / 1e3 / events
    squares = (
        sums.get("ms_ms", 0) / 1e3
        - 2 * ratio * sums.get("events_ms", 0) / 1e3
        + ratio * ratio * sums.get("events_events", 0)
    )
    margin = inf
    if n > 1:
        margin = t_quantile((1 + confidence) / 2, n - 1) * sqrt(max(squares, 0.0) * n / (n - 1)) / events
    return Estimate(value=ratio * 1e3, low=max(ratio - margin, 0.0) * 1e3, high=(ratio + margin) * 1e3)


def _wait(sums: Sums) -> tuple[float, float, int]:
    """Mean of the lock waits in milliseconds, the mean's variance, and how many."""
    n = sums.get("n", 0)
    total = sums.get("wait", 0) / 1e3
    if n < 2:  # noqa: PLR2004 - one value has no variance
        return (total, inf, n)
    spread = max(sums.get("wait_wait", 0) / 1e3 - total * total / n, 0.0)
    return total / n, spread / (n - 1) / n, n


def _difference(ours: tuple[float, float, int], theirs: tuple[float, float, int], confidence: float) -> Estimate | None:
    """Difference of two means (Welch)."""
    (a, var_a, n_a), (b, var_b, n_b) = ours, theirs
    if min(n_a, n_b) < CELL_AT_LEAST:
        return None
    doubt = var_a**2 / (n_a - 1) + var_b**2 / (n_b - 1)
    freedom = (var_a + var_b) ** 2 / doubt if doubt > 0 else inf
    margin = t_quantile((1 + confidence) / 2, freedom) * sqrt(var_a + var_b)
    return Estimate(value=a - b, low=a - b - margin, high=a - b + margin)


def _share(part: int, whole: int, confidence: float) -> Estimate | None:
    """A share of attempts; Wilson's interval, which is right for none of a few as well."""
    if whole == 0:
        return None
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = part / whole
    centre = (share + z * z / (2 * whole)) / (1 + z * z / whole)
    margin = z * sqrt(share * (1 - share) / whole + z * z / (4 * whole * whole)) / (1 + z * z / whole)
    return Estimate(value=share, low=max(centre - margin, 0.0), high=min(centre + margin, 1.0))


def _finite(value: float) -> float | None:
    # JSON has no infinity.
    return value if value < inf else None
