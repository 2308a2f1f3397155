"""Postgres: schema, migrations, and one module per operation. Every function takes the connection it works on."""
