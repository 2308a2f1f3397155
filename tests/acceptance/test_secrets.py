"""What programs print about their configuration, and about a wrong one, holds no password.

Every test with programs looks for that at its end (`pytest_pyfunc_call` in conftest.py). Here is what no other test
provokes.
"""

import pytest

from tests.acceptance.conftest import Programs
from tests.support import wait_until


def test_the_configuration(start: Programs) -> None:
    """What `inspect conf` and `report` show."""
    start.worker()
    for arguments in (("inspect", "conf", "--timeout", "5"), ("report",)):
        shown = start.run(*arguments)
        assert shown.returncode == 0, shown.stderr
        assert "broker_url" in shown.stdout


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_mistyped_database_url(start: Programs, log_format: str) -> None:
    """The driver refuses a parameter; what the worker logs of it has no password."""
    url = f"{start.env['TIDEMARK_DATABASE_URL']}&ssl_mode=require"
    worker = start.worker("-P", "solo", env={"TIDEMARK_DATABASE_URL": url, "TIDEMARK_LOG_FORMAT": log_format})
    start.run("call", "tasks.fan_out")

    def the_worker_has_logged_the_failure() -> bool:
        return "cannot be read" in worker.logs()

    wait_until(the_worker_has_logged_the_failure)
