"""Alembic's environment: runs the migrations on the connection that `db.migrate` hands over."""

from alembic import context

context.configure(**context.config.attributes)
context.run_migrations()
