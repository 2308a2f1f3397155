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


def compare(group: str, scenario: str, results: dict[str, Result], *, note: str = "", **more: Any) -> Entry:
    """Entry of the arms `ours`, `baseline` and `limit`, the last two where there are such."""
    ours, baseline, limit = results["ours"], results.get("baseline"), results.get("limit")
    notes = [note] if note else []
    if all(result.log_bytes for result in results.values()):
        notes.append(f"log: {' / '.join(f'{result.log_bytes:,.0f}' for result in results.values())} bytes an event")
    if limit and limit.cpu_micros and ours.cpu_micros:
        notes.append(f"{limit.cpu_micros / ours.cpu_micros:.2f} of the limit by CPU time")
    return Entry(
        group=group,
        scenario=scenario,
        ours=ours.rate,
        baseline=baseline.rate if baseline else None,
        limit=limit.rate if limit else None,
        vs_baseline=share(ours, baseline) if baseline else None,
        vs_limit=share(ours, limit) if limit else None,
        note="; ".join(notes),
        **more,
    )
