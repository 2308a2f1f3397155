"""One line of the results."""

from dataclasses import dataclass
from typing import Any

from tests.benchmarks.measure import Result, share


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Rates in events per second unless `unit` says otherwise; None where a side does not apply."""

    group: str
    scenario: str
    ours: float
    baseline: float | None = None
    limit: float | None = None
    vs_baseline: float | None = None
    vs_limit: float | None = None
    unit: str = "events/s"
    x: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def compare(group: str, scenario: str, results: dict[str, Result], **more: Any) -> Entry:
    """Entry of the arms `ours`, `baseline` and `limit`, the last two where there are such."""
    ours, baseline, limit = results["ours"], results.get("baseline"), results.get("limit")
    return Entry(
        group=group,
        scenario=scenario,
        ours=ours.rate,
        baseline=baseline.rate if baseline else None,
        limit=limit.rate if limit else None,
        vs_baseline=share(ours, baseline) if baseline else None,
        vs_limit=share(ours, limit) if limit else None,
        **more,
    )
