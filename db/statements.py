r"""The statements in `db/sql`, run by name: one file a subject, each statement under its line `-- name: …`.

Parameters are `$1`, `$2`, …, so each runs as it stands: in psql with `\bind`, behind `PREPARE name AS`, and here
through psycopg's raw cursor.

The hot ones begin with a hint, `/*+ … */`. It is a comment to all but the extension pg_hint_plan, some versions of
which find it only at the head of a statement. It stands in the file for everybody: to add it where the extension is
loaded would take a question to every connection and save nothing. The plans are kept without it by
`transaction_settings`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import psycopg
from psycopg import RawCursor
from psycopg.rows import BaseRowFactory, TupleRow, class_row, namedtuple_row, tuple_row

from db import arrays
from db.translate import domain_errors, is_bigint, is_int, is_seconds, is_storable

_SQL = Path(__file__).with_name("sql")
_STATEMENT = re.compile(r"^-- name: (\w+)\n(.*?);?\s*(?=^-- name: |\Z)", re.MULTILINE | re.DOTALL)
_CAST = re.compile(rb"\$(\d+)::(\w+(?: precision)?(?:\[\])?)")
_Row = TypeVar("_Row")
Connection = psycopg.Connection[Any]

# Their files go by name, so cursors.sql, which others call, comes early. Views and grants need all functions.
_LAST = ("views", "grants")


@cache
def statements() -> Mapping[str, bytes]:
    """Every statement by its name, without that line; the files are read once per process."""
    found = (_STATEMENT.findall(file.read_text("utf-8")) for file in sorted(_SQL.glob("*.sql")))
    return {name: text.encode() for name, text in chain.from_iterable(found)}


def _all(fits: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or (isinstance(value, list | tuple) and all(map(fits, value)))


def _is_uuid(value: object) -> bool:
    return value is None or isinstance(value, UUID)


# What drivers and Postgres complain about in many ways, none of which names the parameter. Arrays of integers are
# checked where they are made.
_TYPES: dict[bytes, tuple[Callable[[object], bool], str]] = {
    b"int": (is_int, "an integer of 32 bits"),
    b"bigint": (is_bigint, "an integer of 64 bits"),
    b"text": (is_storable, "a str without NUL or lone surrogates"),
    b"text[]": (_all(is_storable), "a list of str without NUL or lone surrogates"),
    b"uuid": (_is_uuid, "a UUID"),
    b"uuid[]": (_all(_is_uuid), "a list of UUIDs"),
    b"double precision": (is_seconds, "a number of seconds, at most 100,000,000,000"),
}


@cache
def _casts(name: str) -> Mapping[int, bytes]:
    """The types of a statement's parameters, by their places from 0."""
    return {int(n) - 1: kind for n, kind in _CAST.findall(statements()[name]) if kind in _TYPES}


def _check(name: str, parameters: Sequence[Any]) -> None:
    for place, kind in _casts(name).items():
        fits, wanted = _TYPES[kind]
        if not fits(parameters[place]):
            raise ValueError(f"{name}: ${place + 1} is {parameters[place]!r:.100}. Pass {wanted}.")


def run(
    conn: Connection,
    name: str,
    parameters: Sequence[Any] = (),
    *,
    prepare: bool | None = None,
    row_factory: BaseRowFactory[Any] = tuple_row,
) -> RawCursor[Any]:
    """Execute a statement; `prepare=False` plans it for these very parameters each time.

    It works on any connection, whatever rows and cursors that has. Driver errors leave as Tidemark's own where they
    stand for one. Raises ValueError for a parameter that is none of its type, before it is sent.
    """
    _check(name, parameters)
    cursor = RawCursor(conn, row_factory=row_factory)
    arrays.register(cursor.adapters)
    with domain_errors():
        cursor.execute(statements()[name], parameters, prepare=prepare)
    return cursor


def all_(
    conn: Connection,
    kind: type[_Row],
    name: str,
    parameters: Sequence[Any] = (),
    *,
    prepare: bool | None = None,
) -> list[_Row]:
    """Every row as a `kind`, whose fields are called as the columns."""
    return run(conn, name, parameters, prepare=prepare, row_factory=class_row(kind)).fetchall()


def rows(conn: Connection, name: str, parameters: Sequence[Any] = (), *, prepare: bool | None = None) -> list[Any]:
    """Every row, with an attribute for each column."""
    return run(conn, name, parameters, prepare=prepare, row_factory=namedtuple_row).fetchall()


def values(conn: Connection, name: str, parameters: Sequence[Any] = (), *, prepare: bool | None = None) -> TupleRow:
    """The one row of a statement that always has one: an aggregate's, a function's, one that a migration made."""
    found: list[TupleRow] = run(conn, name, parameters, prepare=prepare).fetchall()
    return found[0]


@contextmanager
def pipelined(conn: Connection) -> Iterator[None]:
    """A transaction on an idle connection, with the planner's settings that materializing and deleting need.

    Only read committed makes materializing safe: its snapshot must be taken after the wait for the lock.

    Its statements are sent without waiting for the answers to earlier ones.
    The server runs one after the other, each in a snapshot of its own, and none after one that failed. psycopg's
    `conn.transaction()` waits at each end of the block as well, which is half of a small transaction's round trips.
    """
    try:
        with domain_errors(), conn.pipeline():
            if conn.autocommit:
                conn.execute("begin", prepare=True)
            conn.execute("set transaction isolation level read committed", prepare=True)
            run(conn, "transaction_settings", prepare=True)
            yield
            conn.execute("commit", prepare=True)
    except BaseException:
        # A connection that is lost has rolled back already, and the error at hand says why.
        with suppress(psycopg.OperationalError):
            conn.rollback()
        raise


def routine_files() -> Iterable[Path]:
    """The files of functions, views and grants in the order they are to be applied."""
    routines = sorted((_SQL / "functions").glob("*.sql"))
    return sorted(routines, key=lambda file: _LAST.index(file.stem) + 1 if file.stem in _LAST else 0)
