"""Settings: frozen, validated, and silent about passwords."""

import re

import pytest
from pydantic import ValidationError

from config.errors import SettingsError
from config.settings import Settings, load_settings
from db.pool import session_settings

PASSWORD = "open-sesame"


pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("name", ["shards", "database_url"])
def test_frozen(name: str) -> None:
    with pytest.raises(ValidationError):
        setattr(load_settings(), name, 3)


def test_defaults_of_the_seed() -> None:
    settings = load_settings()
    assert (settings.pool_open, settings.pool_idle, settings.pool_lifetime) == (25, 10, 3600)


def test_environment_is_read(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TIDEMARK_SHARDS", "3")
    environment.setenv("TIDEMARK_DATABASE_URL", "postgresql://u@h/d")
    settings = load_settings()
    assert (settings.shards, settings.database_url) == (3, "postgresql://u@h/d")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TIDEMARK_SHARDS", "0"),
        ("TIDEMARK_SHARDS", "many"),
        ("TIDEMARK_SHARDS", "1.5"),
        ("TIDEMARK_EVENTS_PER_PARTITION", "0"),
        ("TIDEMARK_EVENTS_PER_TASK", "-1"),
        ("TIDEMARK_PARTITIONS_PER_TASK", "0"),
        ("TIDEMARK_TASK_SECONDS", "0"),
        ("TIDEMARK_FAN_OUT_INTERVAL", "nan"),
        ("TIDEMARK_SWEEP_INTERVAL", "inf"),
        ("TIDEMARK_DELETE_BATCH", "0"),
        ("TIDEMARK_POOL_OPEN", "0"),
        ("TIDEMARK_POOL_IDLE", "-1"),
        ("TIDEMARK_POOL_LIFETIME", "-5"),
        # Less than a millisecond would reach Postgres as 0, which means no limit.
        ("TIDEMARK_LOCK_TIMEOUT", "0.0001"),
        ("TIDEMARK_RETRIES", "21"),
        ("TIDEMARK_VISIBILITY_TIMEOUT", "5"),
        ("TIDEMARK_LOG_FORMAT", "xml"),
        ("TIDEMARK_DATABASE_URL", "mysql://u@h/d"),
        ("TIDEMARK_DATABASE_URL", "postgresql://u@[h/d"),
        ("TIDEMARK_BROKER_URL", "http://h"),
        ("TIDEMARK_REDIS_URL", "http://h"),
        ("TIDEMARK_OBJECT_STORE", "gs://bucket"),
        ("TIDEMARK_OBJECT_STORE", "file://relative"),
        ("TIDEMARK_OBJECT_STORE", "file:///"),
        ("TIDEMARK_OBJECT_STORE", "s3://"),
        ("TIDEMARK_OBJECT_STORE_OPTIONS", "{"),
        ("TIDEMARK_OBJECT_STORE_OPTIONS", "[]"),
        ("TIDEMARK_OBJECT_GRACE_SECONDS", "0"),
        ("TIDEMARK_OBJECT_TTL_SECONDS", "-1"),
    ],
)
def test_bad_values_name_their_variable(variable: str, value: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(variable, value)
    with pytest.raises(SettingsError, match=re.escape(variable)):
        load_settings()


def test_all_bad_variables_are_named_at_once(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TIDEMARK_SHARDS", "0")
    environment.setenv("TIDEMARK_RETRIES", "-1")
    with pytest.raises(SettingsError, match=r"(?s)TIDEMARK_SHARDS.*TIDEMARK_RETRIES"):
        load_settings()


def test_a_lock_wait_that_the_statement_timeout_would_cancel(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TIDEMARK_LOCK_TIMEOUT", "61")
    with pytest.raises(SettingsError, match=r"TIDEMARK_LOCK_TIMEOUT.*TIDEMARK_STATEMENT_TIMEOUT"):
        load_settings()


@pytest.mark.parametrize(
    "name", ["TASK_SECONDS", "MAINTENANCE_SECONDS", "POOL_WAIT", "LOCK_TIMEOUT", "STATEMENT_TIMEOUT"]
)
def test_a_task_that_redis_would_hand_out_twice(name: str, environment: pytest.MonkeyPatch) -> None:
    """Whichever part of its longest time is too long for the visibility timeout."""
    environment.setenv("TIDEMARK_STATEMENT_TIMEOUT", "100")
    environment.setenv("TIDEMARK_VISIBILITY_TIMEOUT", "260")
    load_settings()
    environment.setenv(f"TIDEMARK_{name}", "110" if name == "STATEMENT_TIMEOUT" else "30")
    with pytest.raises(SettingsError, match="TIDEMARK_VISIBILITY_TIMEOUT"):
        load_settings()


def test_the_time_limit_outlasts_the_last_attempt() -> None:
    """Begun as the task's time ends, it may wait for a connection and a lock, and then run one statement."""
    settings = Settings(task_seconds=7, pool_wait=11, lock_timeout=13, statement_timeout=17)
    assert settings.hard_time_limit > 7 + 11 + 13 + 17
    assert Settings(maintenance_seconds=9).hard_time_limit == Settings(task_seconds=9).hard_time_limit


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("TIDEMARK_DATABASE_URL", f"mysql://user:{PASSWORD}@host/database"),
        ("TIDEMARK_DATABASE_URL", f"postgresql://user:{PASSWORD}@[host/database"),
        ("TIDEMARK_BROKER_URL", f"http://user:{PASSWORD}@host"),
        ("TIDEMARK_REDIS_URL", f"http://user:{PASSWORD}@host"),
        ("TIDEMARK_OBJECT_STORE", f"s3://user:{PASSWORD}@bucket"),
        ("TIDEMARK_OBJECT_STORE_OPTIONS", f'{{"secret": "{PASSWORD}"'),
    ],
)
def test_passwords_are_not_repeated_in_messages(variable: str, value: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert PASSWORD not in str(caught.value)
    assert variable in str(caught.value)


def test_passwords_do_not_appear_in_a_printed_object(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("TIDEMARK_DATABASE_URL", f"postgresql://user:{PASSWORD}@host/database")
    environment.setenv("TIDEMARK_BROKER_URL", f"redis://:{PASSWORD}@host")
    environment.setenv("TIDEMARK_REDIS_URL", f"redis://:{PASSWORD}@host")
    environment.setenv("TIDEMARK_OBJECT_STORE_OPTIONS", f'{{"secret": "{PASSWORD}"}}')
    settings = load_settings()
    assert settings.object_store_options == {"secret": PASSWORD}
    assert PASSWORD not in f"{settings!r} {settings}"


@pytest.mark.parametrize(("version", "known"), [(150_000, False), (170_000, True), (180_000, True)])
def test_session_settings_fit_the_server(version: int, known: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    values = session_settings(Settings(lock_timeout=0.25), version)
    assert values["lock_timeout"] == "250ms"
    assert ("transaction_timeout" in values) is known
