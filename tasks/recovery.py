"""Mends what keeps a worker of Celery 5.7 from surviving the loss of Redis.

While a late-acknowledging task runs and Redis goes away, the consumer's event loop meets a connection that was torn
down already and dies with `AttributeError: 'NoneType' object has no attribute …`, which ends the worker. Kombu treats
the errors in `Transport.connection_errors` as a lost connection, after which the consumer starts over: exactly what is
right here. tests/acceptance/test_outages.py tells when this can go.
"""

from kombu.transport.redis import Transport


def treat_torn_down_channels_as_lost_connections() -> None:
    """Count AttributeError among the Redis transport's connection errors; once, however often called."""
    if AttributeError not in Transport.connection_errors:
        Transport.connection_errors = (*Transport.connection_errors, AttributeError)
