"""Kinds of arguments several commands take."""

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import click

MAX_INT = 2**31 - 1
MAX_BIGINT = 2**63 - 1
# Characters of what was given.
_SHOWN = 40


class Name(click.ParamType[str]):
    """Text that Postgres can store: no NUL, and no bytes that are no UTF-8, which Python hides in surrogates."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        given = str(value)
        try:
            given.encode()
        except UnicodeEncodeError:
            self.fail(f"{given.encode(errors='replace').decode()!r} is no UTF-8", param, ctx)
        if "\0" in given:
            self.fail("it contains a NUL character", param, ctx)
        return given


class Offset(click.ParamType[str | int]):
    """`earliest`, `latest` or a number."""

    name = "offset"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | int:
        given = str(value).lower()
        if given in {"earliest", "latest"}:
            return given
        # The length first: Python refuses to read numbers with thousands of digits.
        if re.fullmatch(r"0*[0-9]{1,19}", given) and int(given[-19:]) <= MAX_BIGINT:
            return int(given[-19:])
        return self.fail(
            f"{str(value)[:_SHOWN]!r} is neither earliest nor latest nor a number from 0 to {MAX_BIGINT}", param, ctx
        )


class Quantity(click.ParamType[int | None]):
    """A positive number with a unit, rounded to the smallest of the units; None for `none`, where that is allowed."""

    def __init__(self, name: str, units: Mapping[str, int], examples: str, *, none: bool = False) -> None:
        self.name = f"{name}|none" if none else name
        self._units = units
        self._none = none
        self._wanted = f"a {name} such as {examples}{' or none' * none}; units: {', '.join(filter(None, units))}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        given = str(value).strip().lower()
        if self._none and given == "none":
            return None
        units = {unit.lower(): factor for unit, factor in self._units.items()}
        # The lengths first: Python refuses to read numbers with thousands of digits.
        found = re.fullmatch(r"([0-9]{1,19}(?:\.[0-9]{1,9})?) ?([a-z]*)", given)
        if found and found[2] in units:
            amount = round(Decimal(found[1]) * units[found[2]])
            if 1 <= amount <= MAX_BIGINT:
                return amount
        return self.fail(f"{str(value)[:_SHOWN]!r} is not {self._wanted}", param, ctx)


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

NAME = Name()
OFFSET = Offset()
PARTITION = click.IntRange(min=0, max=MAX_INT)
TIME_LIMIT = Quantity("time", _TIMES, "7d, 12h", none=True)
SIZE_LIMIT = Quantity("size", _SIZES, "1GB, 500MiB", none=True)
SIZE = Quantity("size", _SIZES, "1GB, 500MiB")
