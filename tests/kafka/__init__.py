"""A Kafka broker on Tidemark, for its authors to copy: `python -m tests.kafka --help`.

It keeps nothing but connections: record batches are in objects, all else is in Postgres, behind Tidemark's functions.
So any broker serves any partition, and one that is killed loses nothing. `produce` and `fetch` are what to read first.
"""
