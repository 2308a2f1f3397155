"""The fixtures of tests/acceptance over containers: `make test-docker`. Without an engine every test here is skipped.

Only what starts something is replaced; pytest-celery's fixtures, tests and oracle are the acceptance suite's own.

APP_IMAGE, POSTGRES_IMAGE, REDIS_IMAGE and PYTHON_IMAGE mean what they mean in compose.yaml. Without APP_IMAGE the image
is built first, by `docker build` with whatever DOCKER_BUILD_OPTIONS says besides.
"""

import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from uuid import uuid4

import pytest

from tasks.app import TidemarkApp
from tests.acceptance.conftest import (
    Place,
    Programs,
    app,
    celery_backend_cluster,
    celery_broker_cluster,
    celery_setup,
    celery_setup_app,
    celery_worker,
    celery_worker_cluster,
    log,
    place,
    produce,
    pytest_pyfunc_call,
)
from tests.acceptance.nodes import Worker
from tests.demo.programs import ROOT
from tests.docker.engine import ContainerProcess, Engine, NoEngineError, PostgresContainer, RedisContainer, inside
from tests.support import wait_until

__all__ = [
    "app",
    "celery_backend_cluster",
    "celery_broker_cluster",
    "celery_setup",
    "celery_setup_app",
    "celery_worker",
    "celery_worker_cluster",
    "log",
    "place",
    "produce",
    "pytest_pyfunc_call",
]

# As in compose.yaml; a test compares them.
POSTGRES_IMAGE = os.environ.get("POSTGRES_IMAGE", "postgres:18-trixie")
REDIS_IMAGE = os.environ.get("REDIS_IMAGE", "redis:8.2")
READY_SECONDS = 120.0


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    try:
        client = Engine.connect()
    except NoEngineError as error:
        pytest.skip(f"no Docker engine answers ({error}); start one, or say where it is with DOCKER_HOST")
    run = uuid4().hex[:8]
    made = Engine(client=client, network=client.networks.create(f"tidemark-test-{run}"), image=_image(), run=run)
    yield made
    made.remove()
    client.close()


def _image() -> str:
    if given := os.environ.get("APP_IMAGE"):
        return given
    arguments = shlex.split(os.environ.get("DOCKER_BUILD_OPTIONS", ""))
    if python := os.environ.get("PYTHON_IMAGE"):
        arguments += ["--build-arg", f"PYTHON_IMAGE={python}"]
    tag = "tidemark:test"
    subprocess.run(
        ["docker", "build", "--file", "config/Dockerfile", "--tag", tag, *arguments, "."], check=True, cwd=ROOT
    )
    return tag


@pytest.fixture(scope="session")
def postgres_server(engine: Engine) -> Iterator[PostgresContainer]:
    settings = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}
    with PostgresContainer(engine, "postgres", POSTGRES_IMAGE, settings) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(engine: Engine) -> Iterator[RedisContainer]:
    with RedisContainer(engine, "redis", REDIS_IMAGE) as server:
        yield server


@pytest.fixture(scope="session")
def crashable_postgres(engine: Engine) -> Iterator[PostgresContainer]:
    with PostgresContainer(engine, "crashable-postgres", POSTGRES_IMAGE, {"max_connections": "200"}) as server:
        yield server


@pytest.fixture
def crashable_redis(engine: Engine) -> Iterator[RedisContainer]:
    with RedisContainer(engine, "crashable-redis", REDIS_IMAGE) as server:
        yield server


class ContainerPrograms(Programs):
    """Starts Tidemark's programs in containers; commands of a person's still run here, as a person's would."""

    def __init__(self, place: Place, app: TidemarkApp, engine: Engine, translate: Callable[[str], str]) -> None:
        super().__init__(place, app)
        self._engine = engine
        self._translate = translate

    def process(  # type: ignore[override]  # has what is used of a process
        self, name: str, argv: Sequence[str], env: Mapping[str, str] | None = None, *, may_end: bool = False
    ) -> ContainerProcess:
        # The image's entry point is `celery -A tasks`.
        arguments = argv[argv.index("-A") + 2 :]
        values = {key: self._translate(value) for key, value in {**self.place.env, **(env or {})}.items()}
        process = ContainerProcess(self._engine, name, arguments, values)
        self._programs.append(process)  # type: ignore[arg-type]  # as above
        return process

    def ready(self, *workers: Worker) -> None:
        """As for processes, but a container takes longer to start."""

        def all_workers_are_ready() -> bool:
            for worker in workers:
                assert worker.process.running, worker.logs()
            return all(" ready." in worker.logs() for worker in workers)

        wait_until(all_workers_are_ready, timeout=READY_SECONDS)


@pytest.fixture
def start(request: pytest.FixtureRequest, place: Place, app: TidemarkApp, engine: Engine) -> Iterator[Programs]:
    servers = [
        request.getfixturevalue(name)
        for name in ("postgres_server", "redis_server", "crashable_postgres", "crashable_redis")
        if name in request.fixturenames
    ]
    programs = ContainerPrograms(place, app, engine, inside(servers))
    yield programs
    programs.close()
