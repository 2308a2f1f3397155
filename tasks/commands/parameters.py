"""Kinds of arguments several commands take."""

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import partial
from typing import Any

import click

MAX_INT = 2**31 - 1
MAX_BIGINT = 2**63 - 1
# Characters of what was given.
_SHOWN = 40


class _Kind(click.ParamType[Any]):
    """What a function reads, under a name for help. What it refuses click blames on the right argument."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name, self._read = name, read

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> Any:
        return self._read(str(value))


def _read_name(given: str) -> str:
    """Text that Postgres can store: no NUL, and no bytes that are no UTF-8, which Python hides in surrogates."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise click.BadParameter(f"{given.encode(errors='replace').decode()!r} is no UTF-8") from None
    if "\0" in given:
        raise click.BadParameter("it contains a NUL character")
    return given


def _read_offset(given: str) -> str | int:
    if given.lower() in {"earliest", "latest"}:
        return given.lower()
    # The length first: Python refuses to read numbers with thousands of digits.
    if re.fullmatch(r"0*[0-9]{1,19}", given) and int(given[-19:]) <= MAX_BIGINT:
        return int(given[-19:])
    wanted = f"neither earliest nor latest nor a number from 0 to {MAX_BIGINT}"
    raise click.BadParameter(f"{given[:_SHOWN]!r} is {wanted}")


def _read_quantity(given: str, *, wanted: str, units: Mapping[str, int], none: bool = False) -> int | None:
    """A positive number with a unit, rounded to the smallest one; with `none` also that word, for None, and zero."""
    text = given.strip().lower()
    if none and text == "none":
        return None
    factors = {unit.lower(): factor for unit, factor in units.items()}
    # The lengths first: Python refuses to read numbers with thousands of digits.
    found = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,9})?) ?([a-z]*)", text)
    if found and found[2] in factors:
        amount = round(Decimal(found[1]) * factors[found[2]])
        if (0 if none else 1) <= amount <= MAX_BIGINT:
            return amount
    raise click.BadParameter(
        f"{given[:_SHOWN]!r} is not {wanted}{' or none' * none}; units: {', '.join(filter(None, units))}"
    )


class Seconds(click.FloatRange):
    """A number of seconds. Unlike click's own, no `nan`, which lies within every range."""

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:  # noqa: ARG002 - click's signature
        return "SECONDS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return float(seconds)


# Milliseconds. Without a unit a number could be anything.
_TIMES = {"ms": 1, "s": 1_000, "min": 60_000, "h": 3_600_000, "d": 86_400_000, "w": 7 * 86_400_000}
# Bytes, also without a unit.
_SIZES = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}

_read_size = partial(_read_quantity, units=_SIZES, wanted="a size such as 1GB, 500MiB")

NAME = _Kind("text", _read_name)
OFFSET = _Kind("offset", _read_offset)
PARTITION = click.IntRange(min=0, max=MAX_INT)
TIME_LIMIT = _Kind("time|none", partial(_read_quantity, units=_TIMES, wanted="a time such as 7d, 12h", none=True))
SIZE_LIMIT = _Kind("size|none", partial(_read_size, none=True))
SIZE = _Kind("size", _read_size)
