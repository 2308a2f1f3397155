"""Tidemark's app on a machine whose clock is wrong, for `celery -A tests.acceptance.skewed beat`."""

from datetime import datetime, timedelta

from tasks import app

_now = app.now


def _an_hour_ago() -> datetime:
    now: datetime = _now()
    return now - timedelta(hours=1)


app.now = _an_hour_ago

__all__ = ["app"]
