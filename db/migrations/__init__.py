"""Alembic's environment and versions; `db.migrate` is the way in."""
