"""Alembic's environment: runs the migrations on the connection that `db.migrate` hands over."""

from alembic import context

from db.schema import SCHEMA, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table_schema=SCHEMA,
    include_schemas=True,
    transactional_ddl=True,
)
context.run_migrations()
