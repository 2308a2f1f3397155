"""What `celery -A tasks doctor` finds: one value for each thing it looked at."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Level(StrEnum):
    """How bad it is: nothing to do; slower or less safe than it could be; wrong."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """`found` is what is there; where that is not right, `why`, and the statements or commands that `mend` it."""

    area: str
    check: str
    level: Level
    found: str
    why: str = ""
    mend: tuple[str, ...] = ()


def quote_identifier(name: str) -> str:
    """A name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def quote_literal(value: str) -> str:
    """Text as SQL takes it."""
    return "'" + value.replace("'", "''") + "'"


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among findings; ok for none."""
    order = list(Level)
    return max((finding.level for finding in findings), key=order.index, default=Level.OK)
