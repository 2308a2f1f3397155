"""The acceptance tests with RabbitMQ as the broker, and what is its own: single active consumers in place of leases.

Redis stays for results and queued-tokens. Run by `pytest -m rabbitmq`; skipped where no server is installed.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_celery import CeleryBrokerCluster, CeleryTestBroker

from config.queues import all_queues
from tasks.app import TidemarkApp
from tests.acceptance.conftest import Log, Place, Programs, secrets_of
from tests.acceptance.nodes import LocalBroker, ServerContainer
from tests.acceptance.producers import Producers, commit_one
from tests.acceptance.rabbitmq import TLS, RabbitServer, find_program

# Collected here a second time, where `place` leads to RabbitMQ.
from tests.acceptance.test_duplicates import (  # noqa: F401
    test_kill_9_in_mid_task,
    test_two_workers_on_the_same_shards_with_doubled_and_lost_messages,
)
from tests.acceptance.test_pipeline import (  # noqa: F401
    test_ad_hoc_jobs,
    test_commits_become_visible_without_anybody_asking,
    three_commits,
)
from tests.demo.programs import FAST
from tests.support import wait_until

pytestmark = [pytest.mark.rabbitmq, pytest.mark.timeout(180)]


@pytest.fixture(scope="session")
def rabbit_server(server_directory: Path) -> Iterator[RabbitServer]:
    program = find_program()
    if program is None:
        pytest.skip("no RabbitMQ: install rabbitmq-server (Debian: apt-get install rabbitmq-server)")
    server = RabbitServer(program, server_directory / "rabbitmq")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.close()


@pytest.fixture
def celery_broker_cluster(rabbit_server: RabbitServer) -> CeleryBrokerCluster:
    rabbit_server.delete_queues(all_queues(int(FAST["TIDEMARK_SHARDS"])))
    container = LocalBroker(ServerContainer(rabbit_server, "rabbitmq"), rabbit_server.url)
    return CeleryBrokerCluster(CeleryTestBroker(container))


@pytest.fixture
def place(database_url: str, celery_broker_cluster: CeleryBrokerCluster, redis_url: str, tmp_path: Path) -> Place:
    return Place(
        database_url=database_url,
        broker_url=celery_broker_cluster[0].config()["url"],
        redis_url=redis_url,
        directory=tmp_path,
    )


def test_the_next_worker_takes_over(
    start: Programs, app: TidemarkApp, log: Log, produce: Callable[..., Producers]
) -> None:
    """Identical workers: RabbitMQ lets one have a shard's messages, and the next one when that is killed."""
    first = start.worker()
    second = start.worker()
    for partition in log.partitions:
        app.send_task("tasks.materialize", kwargs={"partition_ids": [partition]})

    def all_tasks_are_taken() -> bool:
        return start.stats(first).get("tasks.materialize") == len(log.partitions)

    wait_until(all_tasks_are_taken)
    assert "tasks.materialize" not in start.stats(second)
    start.beat()
    producers = produce()
    time.sleep(1)
    first.process.kill()

    def the_second_materializes() -> bool:
        return start.stats(second).get("tasks.materialize", 0) > 0

    wait_until(the_second_materializes, timeout=60)
    producers.stop()
    log.wait_until_drained()
    assert log.check() == len(log.ledger.sent)


def test_rabbitmq_crashes(
    start: Programs, log: Log, produce: Callable[..., Producers], rabbit_server: RabbitServer
) -> None:
    """Killed and started again under load: the same worker goes on."""
    worker = start.worker()
    start.beat()
    producers = produce()
    time.sleep(1)
    rabbit_server.kill()
    time.sleep(1)
    rabbit_server.restart()
    producers.stop()
    commit_one(log.conn, log.ledger, "bucket/after", log.partitions)
    log.wait_until_drained(timeout=60)
    assert log.check() == len(log.ledger.sent)
    assert worker.process.running


def test_tls(start: Programs, log: Log, rabbit_server: RabbitServer) -> None:
    """The certificate and the name in it are checked; who is refused says where, and tells no password."""
    trusting = {"SSL_CERT_FILE": str(TLS / "ca.pem")}
    good = {"TIDEMARK_BROKER_URL": rabbit_server.tls_url(), **trusting}
    bad = {
        "CERTIFICATE_VERIFY_FAILED": {"TIDEMARK_BROKER_URL": rabbit_server.tls_url(), "SSL_CERT_FILE": ""},
        "Hostname mismatch": {"TIDEMARK_BROKER_URL": rabbit_server.tls_url(host="127.1"), **trusting},
        "ACCESS_REFUSED": {"TIDEMARK_BROKER_URL": rabbit_server.tls_url(password="wr0ng-passw0rd"), **trusting},
    }
    for words, env in bad.items():
        failed = start.celery(words.replace(" ", "-"), "call", "tasks.fan_out", env=env)
        assert failed.wait(60) == 1, failed.output()
        (line,) = failed.output().splitlines()
        assert words in line
        assert "TIDEMARK_BROKER_URL" in line
        assert not [secret for secret in secrets_of(env) if secret in line]
    start.worker(env=good)
    start.celery("beat", "beat", "-l", "INFO", env=good)
    commit_one(log.conn, log.ledger, "bucket/tls", log.partitions)
    log.wait_until_drained(timeout=60)
    assert log.check() == len(log.partitions)
