"""The parts of the benchmarks, by name."""

from typing import Protocol

from tests.benchmarks.bench import Bench
from tests.benchmarks.claims import plan_claims
from tests.benchmarks.curves import plan_curves
from tests.benchmarks.limits import plan_limits
from tests.benchmarks.plan import Measurement
from tests.benchmarks.suite import plan_suite
from tests.benchmarks.sustained import plan_sustained
from tests.benchmarks.through_celery import plan_celery


class Part(Protocol):
    def __call__(self, bench: Bench, rounds: int, *, quick: bool) -> list[Measurement]: ...


PARTS: dict[str, Part] = {
    "suite": plan_suite,
    "limits": plan_limits,
    "curves": plan_curves,
    "claims": plan_claims,
    "celery": plan_celery,
    "sustained": plan_sustained,
}
