"""A part of `make test-faults`, to the running system: then the history check over everything."""

import pytest

from tests.faults.__main__ import run

FAULTS = (
    "child dies at a boundary",
    "answers to commits are lost",
    "answers to materializations are lost",
    "sessions are terminated",
    "postgres is killed",
    "producer is killed",
    "messages are doubled delayed and reordered",
    "records are deleted",
    "topic is deleted",
)


@pytest.mark.timeout(300)
def test_nothing_is_lost_doubled_or_reordered() -> None:
    rows, findings, skipped = run(0, FAULTS, rounds=1)
    assert [finding.violation for finding in findings] == [None] * 10
    assert rows.keys() == set(FAULTS)
    assert not skipped
    assert all(row.injections and row.at_stake for row in rows.values()), rows
    # Each check had something to check.
    assert all(int(finding.counted.split()[0].replace(",", "")) for finding in findings), findings
