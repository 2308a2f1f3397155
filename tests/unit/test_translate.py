"""Which driver error becomes which of ours, and which may be tried again."""

import psycopg
import pytest
from psycopg import errors
from psycopg_pool import PoolTimeout
from sqlalchemy.exc import OperationalError as SqlAlchemyError

from config import errors as domain
from config.errors import TidemarkError, TransientDatabaseError
from db.translate import domain_errors, is_transient, to_domain


def with_code(code: str) -> psycopg.Error:
    """A driver error with a SQLSTATE that psycopg has no class for."""
    error = psycopg.DatabaseError("message")
    error.sqlstate = code
    return error


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("TM001", domain.InvalidCommitError),
        ("TM002", domain.CommitConflictError),
        ("TM003", domain.UnknownPartitionError),
        ("TM004", domain.UnknownTopicError),
        ("TM005", domain.InvalidTopicError),
        ("TM006", domain.TopicExistsError),
        ("TM007", domain.OffsetOutOfRangeError),
        ("TM008", domain.ForeignClusterError),
        ("TM009", domain.InvalidFetchError),
        ("TM010", domain.CommitTooLargeError),
        ("TM011", domain.OffsetNotAvailableError),
    ],
)
def test_every_code_has_its_error(code: str, kind: type[TidemarkError]) -> None:
    translated = to_domain(with_code(code))
    assert type(translated) is kind
    assert str(translated) == "message"
    with pytest.raises(kind), domain_errors():
        raise with_code(code)


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in TidemarkError.__subclasses__() if kind.code is not None]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("error", [errors.UniqueViolation("x"), errors.DeadlockDetected("x"), with_code("TM999")])
def test_what_is_not_ours_passes_unchanged(error: psycopg.Error) -> None:
    assert to_domain(error) is None
    with pytest.raises(type(error)) as caught, domain_errors():
        raise error
    assert caught.value is error


def test_sqlalchemy_wraps_are_looked_into() -> None:
    wrapped = SqlAlchemyError("select 1", {}, with_code("TM003"))
    with pytest.raises(domain.UnknownPartitionError), domain_errors():
        raise wrapped


def test_other_exceptions_pass() -> None:
    with pytest.raises(KeyError), domain_errors():
        raise KeyError("k")


@pytest.mark.parametrize(
    "error",
    [
        errors.DeadlockDetected("x"),
        errors.SerializationFailure("x"),
        errors.LockNotAvailable("x"),
        errors.QueryCanceled("x"),
        errors.IdleInTransactionSessionTimeout("x"),
        errors.AdminShutdown("x"),
        errors.CannotConnectNow("x"),
        errors.TooManyConnections("x"),
        psycopg.OperationalError("connection refused"),
        errors.ReadOnlySqlTransaction("cannot execute INSERT in a read-only transaction"),
        # As PgBouncer reports a server it lost, and one that it could not get.
        errors.ProtocolViolation("server conn crashed?"),
        errors.ProtocolViolation("query_wait_timeout"),
        errors.ConnectionFailure("x"),
        errors.SqlclientUnableToEstablishSqlconnection("x"),
        PoolTimeout("x"),
        TransientDatabaseError("x"),
        domain.OffsetNotAvailableError("x"),
        SqlAlchemyError("select 1", {}, errors.DeadlockDetected("x")),
        SqlAlchemyError("select 1", {}, psycopg.OperationalError("gone")),
    ],
)
def test_transient(error: BaseException) -> None:
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        errors.UniqueViolation("x"),
        errors.DiskFull("x"),
        errors.UndefinedTable("x"),
        with_code("TM001"),
        with_code("TM007"),
        domain.UnknownPartitionError("x"),
        domain.OffsetOutOfRangeError("x"),
        ValueError("x"),
        KeyboardInterrupt(),
        SqlAlchemyError("select 1", {}, errors.UniqueViolation("x")),
    ],
)
def test_not_transient(error: BaseException) -> None:
    assert not is_transient(error)
