"""The server that is measured: the embedded Postgres with the shipped configuration, in a directory of its own."""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from db.migrate import upgrade
from tests.servers import PostgresServer

# What a machine that serves nothing else would give it; the embedded default is made for small ones. Checkpoints would
# fall into one arm or the other by chance: the benchmark makes them itself, before each measurement.
SETTINGS = {
    "shared_buffers": "1GB",
    "effective_cache_size": "4GB",
    "max_wal_size": "8GB",
    "min_wal_size": "2GB",
    "checkpoint_timeout": "30min",
    # A backlog that was just loaded draws it to the tables, at some moment of the following measurements.
    "autovacuum": "off",
    "max_connections": "100",
}


@contextmanager
def running_server(settings: Mapping[str, str] | None = None) -> Iterator[str]:
    """A migrated database on a fresh server; yields its URL and removes everything afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="tidemark-bench-"))
    directory.chmod(0o755)
    try:
        with PostgresServer(directory / "postgres", settings={**SETTINGS, **(settings or {})}).start() as server:
            upgrade(server.url())
            yield server.url()
    finally:
        shutil.rmtree(directory, ignore_errors=True)
