r"""The SQL files: `statement("place_window")` is the text of `db/sql/place_window.sql`.

Parameters are `$1`, `$2`, …, so each file runs as it stands: in psql with `\bind`, behind `PREPARE name AS`, and here
through psycopg's raw cursor.

The hot ones begin with a hint, `/*+ … */`: a comment to all but the extension pg_hint_plan, some versions of which find
it at the head of a statement only. It stands in the file for everybody: adding it where the extension is loaded would
take a question to every connection and save nothing. The plans are kept without it by `transaction_settings`.
"""

from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from pathlib import Path

_SQL = Path(str(files("db"))) / "sql"

# Functions before what calls them is not needed (bodies are resolved when they run); grants need all of them.
_LAST = ("views", "grants")


@cache
def statement(name: str) -> bytes:
    """Text of `db/sql/<name>.sql`; read once per process."""
    return (_SQL / f"{name}.sql").read_bytes()


def routine_files() -> Iterable[Path]:
    """The files of functions, views and grants in the order they are to be applied."""
    routines = sorted((_SQL / "functions").glob("*.sql"))
    return sorted(routines, key=lambda file: _LAST.index(file.stem) + 1 if file.stem in _LAST else 0)
