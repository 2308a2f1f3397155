"""Create the tables."""

from pathlib import Path

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for statement in Path(__file__).with_suffix(".sql").read_text("utf-8").split(";\n"):
        if statement.strip():
            op.execute(statement)
    op.execute(
        "insert into tidemark.cluster (system_identifier, tx_base) select system_identifier, 0 from pg_control_system()"
    )
    op.execute(
        "insert into tidemark.fan_outs (seen_tx, in_flight) "
        "select pg_snapshot_xmax(pg_current_snapshot())::text::bigint - 1, '{}'"
    )
    op.execute(
        "insert into tidemark.sweeps (settled_tx, collected_tx, unsettled) "
        "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint, 0, '{}'"
    )
