"""Logins that are members of one group role each."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psycopg
from psycopg import sql

# By their letters.
GROUPS = {
    "p": "tidemark_producer",
    "c": "tidemark_consumer",
    "w": "tidemark_worker",
    "m": "tidemark_monitor",
    "a": "tidemark_admin",
}


@contextmanager
def logins(url: str) -> Iterator[Mapping[str, str]]:
    """A database's URL, as a superuser reaches it, for a member of each group; `h` is one more producer. They go at the
    end.
    """
    groups = {**GROUPS, "h": GROUPS["p"]}
    made = {letter: f"login_of_{letter}" for letter in groups}
    with psycopg.connect(url, autocommit=True) as admin:
        for letter, name in made.items():
            statement = sql.SQL("create role {} login in role {}")
            admin.execute(statement.format(sql.Identifier(name), sql.Identifier(groups[letter])))
        try:
            yield {letter: url.replace("//tidemark@", f"//{name}@") for letter, name in made.items()}
        finally:
            for name in made.values():
                admin.execute(sql.SQL("drop owned by {0} cascade; drop role {0}").format(sql.Identifier(name)))
