"""Brings a database's schema up to the one this program needs.

Tables change by Alembic migrations; functions, views and grants are replaced from their files every time, so a file
always is what runs. All of it is one transaction behind one advisory lock: two processes that migrate at once do so
one after the other, and a failure leaves the old schema in place.
"""

from collections.abc import Callable
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg.errors import Diagnostic, LockNotAvailable
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from config.errors import SchemaVersionError, TransientDatabaseError
from db.pool import open_connection
from db.statements import Connection, routine_files, run, values
from db.translate import domain_errors

SCHEMA = "tidemark"
_MIGRATIONS = Path(__file__).with_name("migrations")
# Any number, as long as it is always the same: the advisory lock migrations queue behind.
_LOCK_KEY = 0x7469646D61726B
# A migration that waits for a lock makes everything behind it wait too; better to fail and be tried again.
LOCK_TIMEOUT = "10s"


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.set_main_option("path_separator", "os")
    return config


def _version(conn: Connection) -> str | None:
    (is_migrated,) = values(conn, "is_migrated")
    return values(conn, "schema_version")[0] if is_migrated else None


def wanted_version() -> str:
    """The schema version this program was written for."""
    head = ScriptDirectory.from_config(_config()).get_current_head()
    if head is None:
        raise SchemaVersionError("no migrations are installed; reinstall tidemark")
    return head


def migration_files() -> list[Path]:
    """The SQL of the migrations, oldest first."""
    return sorted((_MIGRATIONS / "versions").glob("*.sql"))


def upgrade(
    database_url: str, *, timeout: float | None = None, warn: Callable[[str], object] = lambda _: None
) -> tuple[str | None, str]:
    """Migrate the database; returns the versions before and after. `timeout` as in `db.pool.open_connection`.

    Where it may not create the group roles, it tells `warn` so, with the statements that a superuser has to run. What
    is missing then is granted by the next migration.

    Safe to repeat and to run from several processes. Raises SchemaVersionError when the schema is newer than this
    program, TransientDatabaseError when it does not get its turn within `LOCK_TIMEOUT`.
    """
    driver = open_connection(database_url, autocommit=False, timeout=timeout)

    def tell(notice: Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            warn("\n".join(filter(None, (notice.message_primary, notice.message_hint))))

    driver.add_notice_handler(tell)
    # One connection for both: SQLAlchemy closes it at the end.
    engine = create_engine("postgresql+psycopg://", creator=lambda: driver, poolclass=NullPool)
    with domain_errors(), engine.begin() as connection:
        # First, so that it bounds the wait for the advisory lock as well, which any session could hold.
        driver.execute(f"set local lock_timeout = '{LOCK_TIMEOUT}'".encode())
        try:
            run(driver, "lock_migrations", (_LOCK_KEY,))
        except LockNotAvailable as error:
            raise TransientDatabaseError(
                f"another session has held the lock that migrations queue for longer than {LOCK_TIMEOUT}; try again "
                f"when it is done, or find it in pg_locks, locktype 'advisory'"
            ) from error
        driver.execute(f"create schema if not exists {SCHEMA}".encode())
        before = _version(driver)
        config = _config()
        known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
        if before is not None and before not in known:
            raise SchemaVersionError(
                f"the database has schema version {before}, which this program does not know; "
                f"install the tidemark release that wrote it, or a newer one"
            )
        config.attributes.update(connection=connection, version_table_schema=SCHEMA)
        command.upgrade(config, "head")
        for file in routine_files():
            driver.execute(file.read_bytes())
    return before, wanted_version()


def bring_up(database_url: str) -> None:
    """Migrate a database that is ours alone, if it needs it; cheap when it does not."""
    with open_connection(database_url) as conn:
        try:
            require_current(conn)
        except SchemaVersionError:
            upgrade(database_url)


def require_current(conn: Connection) -> None:
    """Raise SchemaVersionError unless the database has the schema this program needs."""
    found = _version(conn)
    if found != wanted_version():
        raise SchemaVersionError(
            f"database {conn.info.dbname!r} has schema version {found or 'none'}, this program needs "
            f"{wanted_version()}; run: celery -A tasks migrate"
        )
