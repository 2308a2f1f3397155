"""Turns what Postgres reports into Tidemark's own errors: the one place that knows which is which."""

from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors
from psycopg_pool import PoolTimeout

from config.errors import (
    InvalidCommitError,
    InvalidTopicError,
    OffsetNotAvailableError,
    SchemaVersionError,
    TidemarkError,
    TopicExistsError,
    TransientDatabaseError,
    UnknownPartitionError,
)

# What the work at hand met: a smaller transaction, or one of other partitions, may not.
_OF_THE_WORK = (
    errors.DeadlockDetected,
    errors.SerializationFailure,
    errors.LockNotAvailable,
    errors.QueryCanceled,  # statement_timeout
    errors.TransactionTimeout,
    errors.IdleInTransactionSessionTimeout,
)

# What may succeed when it is simply done again: nothing was committed, or committing twice is harmless.
TRANSIENT = (
    *_OF_THE_WORK,
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.DatabaseDropped,
    errors.TooManyConnections,
    # What was the primary is a standby now: the next connection may find the new one.
    errors.ReadOnlySqlTransaction,
    PoolTimeout,
    OffsetNotAvailableError,
    TransientDatabaseError,
)

# What a database that was not migrated answers.
_NO_SCHEMA = (errors.UndefinedTable, errors.UndefinedFunction, errors.UndefinedColumn, errors.InvalidSchemaName)

_BY_CODE = {kind.code: kind for kind in TidemarkError.__subclasses__() if kind.code is not None}

# Constraints whose violation is the caller's mistake; any other one violated is a defect of ours and stays what it is.
_BY_CONSTRAINT: dict[str, type[TidemarkError]] = {
    "record_batch_events_n_records_positive": InvalidCommitError,
    "record_batch_events_range_not_negative": InvalidCommitError,
    "objects_key_length": InvalidCommitError,
    "topics_name_legal": InvalidTopicError,
    "topics_partitions_in_range": InvalidTopicError,
    "topics_retention_ms_not_negative": InvalidTopicError,
    "topics_retention_bytes_not_negative": InvalidTopicError,
    "topics_name_key": TopicExistsError,
}


def is_storable(text: object) -> bool:
    """Whether Postgres can take this as text: a str without NUL and without what UTF-8 has no form for, or None."""
    try:
        return text is None or (isinstance(text, str) and b"\0" not in text.encode())
    except UnicodeEncodeError:
        return False


def is_bigint(value: object) -> bool:
    """Whether Postgres can take this as a bigint: 64 bits, or None. It has no cast from a boolean."""
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63)


def is_seconds(value: object) -> bool:
    """Whether Postgres can count back so many seconds from today: some 3,000 years, or None."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 10**11)


def is_int(value: object) -> bool:
    """Whether Postgres can take this as an int: 32 bits, or None."""
    return value is None or (isinstance(value, int) and -(2**31) <= value < 2**31)


def is_transient(error: BaseException) -> bool:
    """Whether doing the same again may succeed.

    A plain OperationalError without an SQLSTATE is a lost or refused connection; so is one of class 08, which is
    what PgBouncer answers for the server ("server conn crashed?", "query_wait_timeout").
    """
    error = _driver_error(error) or error
    if isinstance(error, TRANSIENT):
        return True
    return isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08").startswith("08")


# Out of disk, memory or connections; a failing disk; a privilege that is missing.
_OF_THE_SERVER = ("53", "58", "42501")


def would_meet_all(error: BaseException) -> bool:
    """Whether any transaction would fail like this: for the connection or the server, not for what it worked on."""
    if isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(_OF_THE_SERVER):
        return True
    if is_transient(error):
        return not isinstance(error, _OF_THE_WORK)
    return not isinstance(error, (psycopg.Error, UnknownPartitionError))


def to_domain(error: psycopg.Error) -> TidemarkError | None:
    """The Tidemark error that a driver error stands for; None when it stands for nothing but itself."""
    if isinstance(error, _NO_SCHEMA) and "tidemark." in str(error):
        return SchemaVersionError(
            f"{error.diag.message_primary}: the database's schema is missing or older than this program; "
            f"run: celery -A tasks migrate"
        )
    kind = _BY_CODE.get(error.sqlstate or "") or _BY_CONSTRAINT.get(error.diag.constraint_name or "")
    if kind is None:
        return None
    message = error.diag.message_primary or str(error)
    hint = error.diag.message_hint
    return kind(f"{message}. {hint}" if hint else message)


@contextmanager
def domain_errors() -> Iterator[None]:
    """Raise Tidemark's errors in place of the driver's; what stands for nothing of ours passes unchanged."""
    try:
        yield
    except Exception as error:
        driver = _driver_error(error)
        domain = None if driver is None else to_domain(driver)
        if driver is None or (domain is None and driver is error):
            raise
        raise domain or driver from error


def _driver_error(error: BaseException) -> psycopg.Error | None:
    # SQLAlchemy wraps it, and callers know the driver's. It is not imported here: commands do without it.
    found = error if isinstance(error, psycopg.Error) else getattr(error, "orig", None)
    return found if isinstance(found, psycopg.Error) else None
