"""The first commit of a run: one batch for every partition."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

from db.commit import Batch, commit_batches
from tests.demo.ledger import Attempt, LedgerWriter, Outcome
from tests.demo.storage import upload

_BYTES = 64


def commit_everywhere(
    conn: psycopg.Connection[Any], objects: Path, ledger: LedgerWriter, key: str, partition_ids: Sequence[int]
) -> None:
    """Upload and commit it, and note it as a producer would."""
    batches = tuple(
        Batch(
            partition_id=partition_id,
            n_records=1,
            byte_offset=index * _BYTES,
            byte_length=_BYTES,
            max_timestamp=time.time_ns() // 1_000_000,
        )
        for index, partition_id in enumerate(partition_ids)
    )
    upload(objects, key, [_BYTES] * len(batches))
    began = time.monotonic()
    object_id = commit_batches(conn, key, batches)
    ledger.write(
        Attempt(
            key=key,
            batches=batches,
            began=began,
            returned=time.monotonic(),
            outcome=Outcome.COMMITTED,
            object_id=object_id,
        )
    )
