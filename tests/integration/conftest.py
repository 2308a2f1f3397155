"""Factories: topics, commits, apps, an installed Tidemark. Their defaults are what a test does not care about."""

import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings

from db.commit import commit_object
from db.topics import create_topic, partition_ids
from tasks.app import TidemarkApp
from tests.support_commands import Cli, app_for

ROOT = Path(__file__).parents[2]
CELERY = str(Path(sys.executable).with_name("celery"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENTRY_POINTS: dict[str, str] = PROJECT["entry-points"]["celery.commands"]


def examples(few: int, **changes: Any) -> settings:
    """Hypothesis' settings: always the same `few` examples, or as many others as TIDEMARK_TEST_EXAMPLES says."""
    many = int(os.environ.get("TIDEMARK_TEST_EXAMPLES", "0"))
    return settings(
        max_examples=many or few,
        # To shrink a failing program takes minutes.
        phases=(Phase.generate,),
        derandomize=not many,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=bool(many),
        **changes,
    )


def make_topic(conn: psycopg.Connection[Any], name: str = "orders", *, partitions: int = 1) -> list[int]:
    """Create a topic; returns the ids of its partitions."""
    create_topic(conn, name, partitions)
    return partition_ids(conn, name)


def commit(
    conn: psycopg.Connection[Any],
    key: str,
    ids: Sequence[int],
    records: int = 1,
    *,
    length: int = 10,
    timestamp: int = 0,
) -> int:
    """Commit an object with a batch for each of `ids`, one behind the other; returns the object's id."""
    n = len(ids)
    offsets = range(0, n * length, length)
    return commit_object(conn, key, ids, [records] * n, offsets, [length] * n, [timestamp] * n)


class MakeApp(Protocol):
    """Makes an app on the test's database and Redis; `changes` are settings. It is closed with the test."""

    def __call__(self, **changes: Any) -> TidemarkApp: ...


@pytest.fixture
def make_app(database_url: str, redis_url: str) -> Iterator[MakeApp]:
    with ExitStack() as stack:

        def make(**changes: Any) -> TidemarkApp:
            return stack.enter_context(app_for(**{"database_url": database_url, "broker_url": redis_url, **changes}))

        yield make


@pytest.fixture
def app(make_app: MakeApp) -> TidemarkApp:
    return make_app()


@pytest.fixture
def cli(app: TidemarkApp) -> Cli:
    return Cli(app)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH on which Tidemark is installed as pyproject.toml says at present, whatever pip installed."""
    directory = tmp_path_factory.mktemp("installed")
    lines = [f"{name} = {target}" for name, target in ENTRY_POINTS.items()]
    # Of two distributions of one name the first one on the path counts.
    for name in {PROJECT["name"], *_our_names()}:
        metadata = directory / f"{name.replace('-', '_')}-0.1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
        (metadata / "entry_points.txt").write_text("\n".join(["[celery.commands]", *lines, ""]))
    return f"{directory}{os.pathsep}{ROOT}"


def _our_names() -> set[str]:
    found = entry_points(group="celery.commands")
    return {e.dist.name for e in found if e.dist is not None and e.value.startswith("tasks.")}
