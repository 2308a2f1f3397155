"""Tidemark's app without `tasks.recovery`, for `celery -A tests.acceptance.unmended worker`."""

from kombu.transport.redis import Transport

from tasks import app

Transport.connection_errors = tuple(kind for kind in Transport.connection_errors if kind is not AttributeError)

__all__ = ["app"]
