"""Tidemark's app with Celery's own consumer, for `celery -A tests.acceptance.unmended worker`."""

from tasks import app

app.consumer_cls = "celery.worker.consumer:Consumer"

__all__ = ["app"]
