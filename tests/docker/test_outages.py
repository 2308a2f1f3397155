"""Servers crash: tests/acceptance/test_outages.py over containers."""

import pytest

from tests.acceptance import test_outages

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

place = test_outages.place
test_postgres_crashes_while_tasks_run = test_outages.test_postgres_crashes_while_tasks_run
test_redis_crashes_while_tasks_run = test_outages.test_redis_crashes_while_tasks_run
