"""A snapshot that somebody holds costs nothing: what vacuum may not remove lies in nobody's way (invariant 7).

By buffers, not by time. In the first edition three hundred passes made each of these some twenty times as dear.
"""

from dataclasses import replace
from typing import Any

from psycopg import Connection, sql
from psycopg.rows import TupleRow

from config.settings import STRATEGIES
from db.commit import Batch, commit_batches
from db.discover import find_committed, save_fan_out, sweep
from db.materialize import materialize
from db.producers import init_producer
from db.statements import statements
from tests.integration.conftest import commit, make_topic
from tests.support import Connect

PARTITIONS = 20
PASSES = 300


def buffers(conn: Connection[Any], query: str | bytes, *, name: str = "") -> int:
    """Pages that a statement looks at, the statements inside of its functions included. What it wrote is undone."""
    text = query.encode() if isinstance(query, str) else query
    with conn.transaction(force_rollback=True):
        conn.execute(statements()["transaction_settings"])
        conn.execute("select set_config('tidemark.locked', array_agg(id)::text, true) from tidemark.topic_partitions")
        if name:
            conn.execute(f"prepare {name} as ".encode() + statements()[name])
            text = b"execute " + text
        # Twice, for what is looked up in the catalogue once.
        for _ in range(2):
            conn.execute("savepoint before")
            row = conn.execute(sql.SQL("explain (analyze, buffers, format json) ") + sql.SQL(text.decode())).fetchone()
            conn.execute("rollback to before")
        if name:
            conn.execute(f"deallocate {name}".encode())
    assert row
    plan = row[0][0]["Plan"]
    return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def test_nothing_gets_dearer_under_a_held_snapshot(connect: Connect, conn: Connection[TupleRow]) -> None:
    ids = make_topic(conn, partitions=PARTITIONS)
    holder, meter = connect(autocommit=False), connect()
    producer = init_producer(conn).producer_id
    # Else psycopg deallocates what it did not prepare, after a rollback.
    meter.prepare_threshold = None

    def work(turns: range) -> None:
        for turn in turns:
            sent = Batch(partition_id=0, n_records=1, byte_offset=0, byte_length=1, max_timestamp=turn)
            sent = replace(sent, producer_id=init_producer(conn, producer).producer_id)
            sent = replace(sent, producer_epoch=turn + 1, base_sequence=0)
            # Twice in each epoch, so that the rows before the last five are deleted again and again.
            for sequence in range(2):
                batches = [replace(sent, partition_id=i, base_sequence=sequence) for i in ids]
                assert set(commit_batches(conn, f"sent {turn} {sequence}", batches).verdicts) == {"accepted"}
            with connect(autocommit=False) as other:
                # Runs while the pass is made, which is remembered for that, and forgotten by the sweep.
                other.execute("select pg_current_xact_id()")
                commit(conn, f"object {turn}", ids)
                assert materialize(conn, ids).events_processed == 3 * PARTITIONS
                other.rollback()
            found = find_committed(conn)
            assert found.commits == 3
            save_fan_out(conn, found)
            if turn % 3 == 0:
                assert list(sweep(conn)) == []

    def costs() -> dict[str, int]:
        found = find_committed(conn)
        last, running = found.seen_tx, sql.Literal(found.in_flight).as_string(conn)
        commit(conn, f"pending {last}", ids)
        literal = f"array[{', '.join(map(str, ids))}]"
        ones = f"array_fill(1, array[{PARTITIONS}])"
        arrays = f"{ones}, {ones}::bigint[], {ones}, {ones}::bigint[]"
        row = conn.execute("select end_offset from tidemark.named_partitions where partition_id = %s", ids[:1])
        (end,) = row.fetchone() or (0,)
        newest = "(select array_agg(id) from (select max(id) as id from tidemark.objects where batches > 0) o)"
        epoch = f"(select max(epoch)::int from tidemark.producers where id = {producer})"
        numbers = ", ".join(f"array_fill({n}, array[{PARTITIONS}])" for n in (f"{producer}::bigint", epoch, 2))
        measured: dict[str, int] = {
            "lock": buffers(meter, f"lock_partitions ({literal})", name="lock_partitions"),
            **{str(s): buffers(meter, f"place_{s} (100)", name=f"place_{s}") for s in STRATEGIES},
            "cursors": buffers(meter, f"select * from tidemark.cursors({literal})"),
            "commit": buffers(meter, f"select tidemark.commit_object('measured', {literal}, {arrays})"),
            "fetch": buffers(meter, f"select * from tidemark.fetch_batches({ids[0]}, {end - 5}, 1000, 5)"),
            "idempotent": buffers(
                meter, f"select * from tidemark.commit_batches('more', {literal}, {arrays}, {numbers})"
            ),
            "epoch": buffers(meter, f"select * from tidemark.init_producer({producer})"),
            "producers": buffers(meter, f"select * from tidemark.producer_states({ids[0]})"),
            "receipts": buffers(meter, f"select * from tidemark.receipts({newest})"),
            "times": buffers(meter, f"select * from tidemark.list_offsets({literal}, {ones}::bigint[])"),
            "fetches": buffers(
                meter,
                f"select * from tidemark.fetch_partitions({literal}, "
                f"array_fill({end - 5}::bigint, array[{PARTITIONS}]), "
                f"array_fill(5::bigint, array[{PARTITIONS}]), 1000, 50)",
            ),
            "fan-out": buffers(
                meter, f"find_committed ({last}, {running}::bigint[], 100, 1000)", name="find_committed"
            ),
            "fan-out state": buffers(meter, "read_fan_out", name="read_fan_out"),
            "sweep": buffers(meter, "find_pending (0, 100, 100, 1000)", name="find_pending"),
            "sweep state": buffers(meter, "begin_sweep", name="begin_sweep"),
        }
        assert materialize(conn, ids).events_processed == PARTITIONS
        save_fan_out(conn, find_committed(conn))
        return measured

    work(range(20))
    holder.execute("set transaction isolation level repeatable read")
    holder.execute("select count(*) from tidemark.runs")
    before = costs()
    work(range(20, 20 + PASSES))
    after = costs()
    holder.rollback()
    # An index may have got a level more in between, and each of its searches a page.
    assert {name: (before[name], count) for name, count in after.items() if count > 1.5 * before[name] + 4} == {}
