"""The real programs, none of them as the owner: each as a login that is a member of one group role."""

import json
import re
import urllib.request
from collections.abc import Iterator, Mapping

import psycopg
import pytest

from db.commit import commit_object
from db.fetch import fetch_batches
from db.receipts import wait
from db.topics import partition_ids
from tests.acceptance.conftest import Place, Programs
from tests.support import wait_until, with_password
from tests.support_roles import logins


@pytest.fixture
def urls(place: Place) -> Iterator[Mapping[str, str]]:
    with logins(place.database_url) as made:
        yield made


def test_no_program_runs_as_the_owner(start: Programs, place: Place, urls: Mapping[str, str]) -> None:
    """Only the migration was the owner's. Sweep, retention, purge and audit go well, too."""

    def as_member(letter: str) -> Mapping[str, str]:
        return {"TIDEMARK_DATABASE_URL": with_password(urls[letter])}

    quick = {"TIDEMARK_RETENTION_INTERVAL": "1", "TIDEMARK_AUDIT_INTERVAL": "1"}
    worker = start.worker(env={**as_member("w"), **quick}, wait=False)
    beat = start.celery("beat", "beat", "-l", "INFO", env={**as_member("w"), **quick})
    exporter = start.celery("exporter", "exporter", "--port", "0", env=as_member("m"))
    created = start.run("topics", "create", "orders", "--partitions", "2", env=as_member("a"))
    assert created.returncode == 0, created.stderr
    start.ready(worker)

    with (
        psycopg.connect(urls["p"], autocommit=True) as producer,
        psycopg.connect(urls["c"], autocommit=True) as consumer,
    ):
        ids = partition_ids(producer, "orders")
        object_id = commit_object(producer, "bucket/1", ids, [2, 3], [0, 10], [10, 10], [0, 0])
        told = wait(producer, [object_id], timeout=20)
        assert [(r.verdict, r.base_offset) for r in told] == [("accepted", 0)] * 2
        assert [b.object_key for b in fetch_batches(consumer, ids[1], 0)] == ["bucket/1"]

    shown = start.run("status", "--json", "--interval", "0", env=as_member("m"))
    assert shown.returncode == 0, shown.stderr
    assert [(t["topic"], t["records"]) for t in json.loads(shown.stdout)["topics"]] == [("orders", 5)]
    page = exporter.output().partition("metrics at ")[2].partition(";")[0]

    def everything_has_run() -> bool:
        with urllib.request.urlopen(page, timeout=5) as answer:
            metrics: str = answer.read().decode()
        assert 'tidemark_exporter_source_up{source="postgres"} 1.0' in metrics
        found = set(re.findall(r'tidemark_task_runs_total{outcome="(\w+)",task="tasks\.(\w+)"}', metrics))
        assert {outcome for outcome, _ in found} <= {"success"}, found
        return {task for _, task in found} >= {"fan_out", "materialize", "sweep", "retain", "purge", "audit"}

    wait_until(everything_has_run, timeout=20)
    assert "permission denied" not in worker.logs() + beat.output() + exporter.output()
