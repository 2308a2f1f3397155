"""Kinds of arguments several commands take."""

import math
from typing import Any

import click

MAX_INT = 2**31 - 1
MAX_BIGINT = 2**63 - 1


class Name(click.ParamType[str]):
    """Text that Postgres can store."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Refuse what is no UTF-8, which Python hides in surrogates, and NUL."""
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
        """The word, or the number where it is one."""
        given = str(value).lower()
        if given in {"earliest", "latest"}:
            return given
        found = _natural(given)
        if found is not None:
            return found
        return self.fail(f"{value!r} is neither earliest nor latest nor a number from 0 to {MAX_BIGINT}", param, ctx)


class Limit(click.ParamType[int | None]):
    """A positive number, or `none` for no limit."""

    name = "number|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number; None for `none`."""
        given = str(value).lower()
        if given == "none":
            return None
        if found := _natural(given):
            return found
        return self.fail(f"{value!r} is neither none nor a number from 1 to {MAX_BIGINT}", param, ctx)


class Seconds(click.FloatRange):
    """A number of seconds. Unlike click's own, no `nan`, which lies within every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, within the range."""
        seconds = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds", param, ctx)
        return float(seconds)


def _natural(given: str) -> int | None:
    digits = given.lstrip("0") or given[-1:]
    # The length first: Python refuses to read numbers with thousands of digits.
    if not (given.isascii() and given.isdigit()) or len(digits) > len(str(MAX_BIGINT)):
        return None
    return int(digits) if int(digits) <= MAX_BIGINT else None


NAME = Name()
OFFSET = Offset()
LIMIT = Limit()
PARTITION = click.IntRange(min=0, max=MAX_INT)
