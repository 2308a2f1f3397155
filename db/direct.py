"""One connection without the pool, for commands: a server that is away is reported at once and in its own words, where
the pool would go on trying until its time is up.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from config.settings import Settings
from db.pool import session_settings
from db.translate import domain_errors

CONNECT_SECONDS = 10


@contextmanager
def connect(url: str, settings: Settings) -> Iterator[psycopg.Connection[Any]]:
    """An autocommit connection, set up as those of the pool are, closed at the end."""
    with domain_errors():
        conn = psycopg.connect(url, autocommit=True, connect_timeout=CONNECT_SECONDS)
        try:
            for name, value in session_settings(settings, conn.info.server_version).items():
                conn.execute("select set_config(%s, %s, false)", (name, value))
            yield conn
        finally:
            conn.close()
