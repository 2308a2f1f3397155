"""The hot path: what a commit writes, what it refuses, and what a replay returns."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from typing import Any

import psycopg
import pytest
from psycopg import Connection, sql
from psycopg.rows import TupleRow, dict_row

from config.errors import (
    CommitConflictError,
    CommitTooLargeError,
    InvalidCommitError,
    TidemarkError,
    UnknownPartitionError,
)
from db.commit import Batch, columns, commit_object
from db.materialize import materialize
from db.topics import PartitionIds, create_topic, partition_ids
from tests.servers import PostgresServer
from tests.support import Connect, wait_until

INT4_MAX = 2**31 - 1
INT8_MIN, INT8_MAX = -(2**63), 2**63 - 1
# The last millisecond of the year 9999.
LAST_MS = 253402300799999
UNKNOWN = 1_000_000


@dataclass(frozen=True)
class Arguments:
    object_key: str | None = "bucket/object-1"
    partition_ids: Sequence[int | None] | None = (1, 2, 1)
    n_records: Sequence[int | None] | None = (5, 6, 7)
    byte_offsets: Sequence[int | None] | None = (0, 100, 200)
    byte_lengths: Sequence[int | None] | None = (100, 100, 50)
    max_timestamps: Sequence[int | None] | None = (1000, 2000, 3000)

    def listed(self) -> tuple[Any, ...]:
        key, *arrays = astuple(self)
        return key, *(None if a is None else list(a) for a in arrays)


def changed(change: dict[str, Any]) -> Arguments:
    return replace(Arguments(), **change)


Commit = Callable[[Connection[Any], Arguments], int]


def by_python(conn: Connection[Any], arguments: Arguments) -> int:
    return commit_object(conn, *arguments.listed())


def by_sql(conn: Connection[Any], arguments: Arguments) -> int:
    row = conn.execute(
        "select tidemark.commit_object(%s::text, %s::int[], %s::int[], %s::bigint[], %s::int[], %s::bigint[])",
        arguments.listed(),
    ).fetchone()
    assert row
    return int(row[0])


@pytest.fixture(scope="module")
def database_url(postgres_server: PostgresServer, template_database: str) -> Iterator[str]:
    """One for all of this module's tests: cloning one for each would take longer than they do."""
    name = sql.Identifier("test_commit")
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin:
        admin.execute(sql.SQL("create database {} template {}").format(name, sql.Identifier(template_database)))
        yield postgres_server.url("test_commit")
        admin.execute(sql.SQL("drop database {} with (force)").format(name))


@pytest.fixture(autouse=True)
def topic(conn: Connection[TupleRow]) -> None:
    conn.execute(
        "truncate tidemark.topics, tidemark.topic_partitions, tidemark.objects, tidemark.record_batch_events, "
        "tidemark.runs, tidemark.passes restart identity cascade"
    )
    create_topic(conn, "orders", 2)
    assert partition_ids(conn, "orders") == [1, 2]


@pytest.fixture(params=[by_python, by_sql], ids=["python", "sql"])
def commit(request: pytest.FixtureRequest) -> Commit:
    function: Commit = request.param
    return function


def written(conn: Connection[Any]) -> tuple[list[TupleRow], list[TupleRow]]:
    return (
        conn.execute("select id, key, batches, partition_ids, batch_counts from tidemark.objects").fetchall(),
        conn.execute(
            "select id >> 16, partition_id, n_records, byte_offset, byte_length, max_timestamp "
            "from tidemark.record_batch_events order by tx, id"
        ).fetchall(),
    )


def test_what_a_commit_writes(conn: Connection[TupleRow], commit: Commit) -> None:
    object_id = commit(conn, Arguments())
    objects, events = written(conn)
    assert objects == [(object_id, "bucket/object-1", 3, [1, 2], [2, 1])]
    assert events == [
        (object_id, 1, 5, 0, 100, 1000),
        (object_id, 2, 6, 100, 100, 2000),
        (object_id, 1, 7, 200, 50, 3000),
    ]


def test_events_and_object_carry_the_transaction(conn: Connection[TupleRow], commit: Commit) -> None:
    with conn.transaction():
        commit(conn, Arguments())
        own = conn.execute("select tidemark.tx_base() + pg_current_xact_id()::text::bigint").fetchone()
    rows = conn.execute("select tx from tidemark.objects union select tx from tidemark.record_batch_events").fetchall()
    assert rows == [own]


def test_array_order_is_event_order(conn: Connection[TupleRow], commit: Commit) -> None:
    count = 3000
    commit(
        conn,
        Arguments(
            partition_ids=[1 + i % 2 for i in range(count)],
            n_records=[1 + i % 7 for i in range(count)],
            byte_offsets=[(i * 7919) % count for i in range(count)],
            byte_lengths=[1] * count,
            max_timestamps=[count - i for i in range(count)],
        ),
    )
    rows = conn.execute(
        "select byte_offset from tidemark.record_batch_events where partition_id = 2 order by tx, id"
    ).fetchall()
    assert [row[0] for row in rows] == [(i * 7919) % count for i in range(1, count, 2)]


def test_batches_one_by_one(conn: Connection[TupleRow]) -> None:
    batch = Batch(partition_id=2, n_records=1, byte_offset=4, byte_length=5, max_timestamp=-1)
    object_id = commit_object(conn, "k", *columns(iter([batch, replace(batch, partition_id=1)])))
    assert written(conn)[1] == [(object_id, 2, 1, 4, 5, -1), (object_id, 1, 1, 4, 5, -1)]


@pytest.mark.parametrize(
    "extreme",
    [
        {"byte_offsets": [INT8_MAX]},
        {"byte_offsets": [0]},
        {"byte_lengths": [INT4_MAX]},
        {"byte_lengths": [0]},
        {"n_records": [INT4_MAX]},
        {"max_timestamps": [LAST_MS]},
        {"max_timestamps": [INT8_MIN]},
        {"max_timestamps": [-1]},
        {"max_timestamps": [2**32]},
        {"object_key": "k" * 1024},
        {"object_key": "ü" * 512},
        {"object_key": " "},
        {"object_key": 'it\'s a \\ "key"; drop table x; -- %s $1'},
    ],
)
def test_extremes_are_stored_as_they_are(extreme: dict[str, Any], conn: Connection[TupleRow], commit: Commit) -> None:
    arguments = replace(
        Arguments(partition_ids=[1], n_records=[1], byte_offsets=[0], byte_lengths=[1], max_timestamps=[0]), **extreme
    )
    commit(conn, arguments)
    objects, events = written(conn)
    key, *values = arguments.listed()
    assert objects[0][1] == key
    assert list(events[0][1:]) == [value[0] for value in values]


def test_views_show_extreme_timestamps(conn: Connection[TupleRow], commit: Commit) -> None:
    """One producer's nonsense must not make the view unreadable for all."""
    commit(conn, Arguments(max_timestamps=[LAST_MS, INT8_MIN, 0]))
    # As it may have been committed before there was a limit.
    conn.execute("update tidemark.record_batch_events set max_timestamp = %s where max_timestamp = 0", (INT8_MAX,))
    assert len(conn.execute("select * from tidemark.named_record_batch_events").fetchall()) == 3


MALFORMED: list[tuple[dict[str, Any], str]] = [
    ({"object_key": None}, "key is empty"),
    ({"object_key": ""}, "key is empty"),
    ({"object_key": "k" * 1025}, "1025 bytes"),
    ({"object_key": "ü" * 513}, "1026 bytes"),
    ({"n_records": (5, 0, 7)}, "batch 2: n_records is 0"),
    ({"n_records": (5, 6, -1)}, "batch 3: n_records is -1"),
    ({"byte_offsets": (-1, 0, 0)}, "batch 1: the byte range starts at -1"),
    ({"byte_offsets": (INT8_MIN, 0, 0)}, "batch 1: the byte range"),
    ({"byte_lengths": (1, -1, 1)}, "batch 2: the byte range .* length -1"),
    ({"max_timestamps": (1, LAST_MS + 1, 1)}, "batch 2: max_timestamp 253402300800000 lies beyond the year 9999"),
    ({"max_timestamps": (1, 1, INT8_MAX)}, "batch 3: max_timestamp 9223372036854775807 lies beyond"),
    ({"n_records": (5, 6)}, "differ in length"),
    ({"byte_offsets": (0, 1)}, "differ in length"),
    ({"byte_lengths": (0, 1, 2, 3)}, "differ in length"),
    ({"max_timestamps": ()}, "differ in length"),
    ({"partition_ids": (1,)}, "differ in length"),
    (
        {"partition_ids": (), "n_records": (), "byte_offsets": (), "byte_lengths": (), "max_timestamps": ()},
        "no batches",
    ),
]
ARRAYS = ("partition_ids", "n_records", "byte_offsets", "byte_lengths", "max_timestamps")


@pytest.mark.parametrize(("change", "message"), MALFORMED)
def test_malformed_arguments(change: dict[str, Any], message: str, conn: Connection[TupleRow], commit: Commit) -> None:
    refused(conn, commit, changed(change), InvalidCommitError, "TM001", message)


@pytest.mark.parametrize("array", ARRAYS)
def test_null_arrays(array: str, conn: Connection[TupleRow], commit: Commit) -> None:
    refused(conn, commit, changed({array: None}), InvalidCommitError, "TM001", "NULL|None")


@pytest.mark.parametrize("array", ARRAYS)
def test_null_elements(array: str, conn: Connection[TupleRow], commit: Commit) -> None:
    refused(conn, commit, changed({array: (1, None, 2)}), InvalidCommitError, "TM001", "NULL|None")


@pytest.mark.parametrize("bad", [UNKNOWN, 0, -1, INT4_MAX])
def test_unknown_partition(bad: int, conn: Connection[TupleRow], commit: Commit) -> None:
    refused(conn, commit, Arguments(partition_ids=(1, bad, 2)), UnknownPartitionError, "TM003", f"{bad} does not exist")


def refused(
    conn: Connection[Any],
    commit: Commit,
    arguments: Arguments,
    kind: type[TidemarkError],
    code: str,
    message: str,
) -> None:
    before = written(conn)
    if commit is by_python:
        with pytest.raises(kind, match=message):
            commit(conn, arguments)
    else:
        with pytest.raises(psycopg.Error, match=message) as caught:
            commit(conn, arguments)
        assert caught.value.sqlstate == code
    assert written(conn) == before


def test_as_many_batches_as_a_commit_may_bring(conn: Connection[TupleRow], commit: Commit) -> None:
    for count in (65_537, 65_536):
        arguments = Arguments(
            partition_ids=[1 + i % 2 for i in range(count)],
            n_records=[1] * count,
            byte_offsets=range(count),
            byte_lengths=[1] * count,
            max_timestamps=[0] * count,
        )
        if count == 65_537:
            refused(conn, commit, arguments, CommitTooLargeError, "TM010", "has 65537 batches.*|65537")
            assert written(conn) == ([], [])
        else:
            object_id = commit(conn, arguments)
    objects, events = written(conn)
    assert objects == [(object_id, "bucket/object-1", 65_536, [1, 2], [32_768, 32_768])]
    assert [event[3] for event in events] == list(range(65_536))


def test_a_commit_that_is_too_large_and_malformed_is_malformed(conn: Connection[TupleRow], commit: Commit) -> None:
    count = 65_537
    arguments = Arguments(None, *[[1] * count] * 5)
    refused(conn, commit, arguments, InvalidCommitError, "TM001", "key is empty")


@pytest.mark.parametrize("position", range(2, 7))
def test_arrays_of_two_dimensions(position: int, conn: Connection[TupleRow]) -> None:
    values = ["'k'", *["array[1,2]"] * 5]
    values[position - 1] = "array[[1],[2]]"
    with pytest.raises(psycopg.Error, match="dimension") as caught:
        conn.execute(f"select tidemark.commit_object({', '.join(values)})".encode())
    assert caught.value.sqlstate == "TM001"
    assert written(conn) == ([], [])


@pytest.mark.parametrize(
    "change",
    [
        {"partition_ids": (2**31, 1, 1)},
        {"n_records": (2**31, 1, 1)},
        {"byte_lengths": (2**31, 1, 1)},
        {"byte_offsets": (2**63, 1, 1)},
        {"max_timestamps": (2**63, 1, 1)},
        {"n_records": (1.0, 1, 1)},
        {"n_records": ("1", 1, 1)},
        {"object_key": "a\0b"},
        {"object_key": "\ud800"},
        {"object_key": 5},
        {"object_key": b"bytes"},
    ],
)
def test_what_postgres_could_not_read_is_refused_before(change: dict[str, Any], conn: Connection[TupleRow]) -> None:
    with pytest.raises(InvalidCommitError):
        by_python(conn, changed(change))
    assert written(conn) == ([], [])


def test_the_first_error_does_not_poison_an_autocommit_connection(conn: Connection[TupleRow], commit: Commit) -> None:
    with pytest.raises((InvalidCommitError, psycopg.Error)):
        commit(conn, Arguments(object_key=""))
    commit(conn, Arguments())
    assert len(written(conn)[1]) == 3


def test_replay_returns_the_first_id_and_writes_nothing(conn: Connection[TupleRow], commit: Commit) -> None:
    first = by_sql(conn, Arguments())
    before = written(conn)
    # Seven times: psycopg prepares the statement on the way.
    assert {commit(conn, Arguments()) for _ in range(7)} == {first}
    assert written(conn) == before


@pytest.mark.parametrize(
    "change",
    [
        {"partition_ids": (2, 1, 1)},
        {"n_records": (6, 5, 7)},
        {"byte_offsets": (0, 100, 201)},
        {"byte_lengths": (100, 100, 51)},
        {"max_timestamps": (1000, 2000, 3001)},
        {
            "partition_ids": (1, 2),
            "n_records": (5, 6),
            "byte_offsets": (0, 100),
            "byte_lengths": (100, 100),
            "max_timestamps": (1000, 2000),
        },
    ],
)
def test_other_content_under_the_same_key_is_a_conflict(
    change: dict[str, Any], conn: Connection[TupleRow], commit: Commit
) -> None:
    by_python(conn, Arguments())
    refused(conn, commit, changed(change), CommitConflictError, "TM002", "committed already")


LITERALS = ["array[1,2]", "array[5,6]", "array[0,100]::bigint[]", "array[100,50]", "array[1000,2000]::bigint[]"]


def with_bounds(bounds: str, which: Sequence[int]) -> str:
    """The same commit, with other subscripts in some of its arrays."""
    arrays = [
        f"('{bounds}=' || ({value})::text)::{'bigint' if 'bigint' in value else 'int'}[]" if number in which else value
        for number, value in enumerate(LITERALS)
    ]
    return f"select tidemark.commit_object('k', {', '.join(arrays)})"


@pytest.mark.parametrize("bounds", ["[0:1]", "[-5:-4]", "[7:8]"])
@pytest.mark.parametrize("which", [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4]])
def test_subscripts_are_no_content(bounds: str, which: Sequence[int], conn: Connection[TupleRow]) -> None:
    """A client whose arrays begin at zero, and one whose arrays begin at one, mean the same."""
    row = conn.execute(with_bounds(bounds, which).encode()).fetchone()
    before = written(conn)
    assert [event[1:] for event in before[1]] == [(1, 5, 0, 100, 1000), (2, 6, 100, 50, 2000)]
    assert conn.execute(with_bounds(bounds, []).encode()).fetchone() == row
    assert conn.execute(with_bounds("[3:4]", [1, 3]).encode()).fetchone() == row
    assert written(conn) == before
    with pytest.raises(psycopg.Error) as caught:
        conn.execute(with_bounds(bounds, which).replace("5,6", "6,5").encode())
    assert caught.value.sqlstate == "TM002"


def order(conn: Connection[TupleRow]) -> list[str]:
    while materialize(conn, [1]).events_processed:
        pass
    rows = conn.execute("select object_key from tidemark.record_batches where partition_id = 1 order by start_offset")
    return [row[0] for row in rows.fetchall()]


@pytest.mark.parametrize("wrote_before", [True, False])
def test_the_order_counts_from_the_first_write_of_a_transaction(
    wrote_before: bool,  # noqa: FBT001
    connect: Connect,
    conn: Connection[TupleRow],
    commit: Commit,
) -> None:
    """A transaction that has an id began then, also for what it commits much later: that may get lower offsets."""
    block = connect(autocommit=False)
    # Reading gives none.
    block.execute("select count(*) from tidemark.objects")
    if wrote_before:
        block.execute("select pg_current_xact_id()")
    one = Arguments(None, *[(1,)] * 5)
    commit(conn, replace(one, object_key="returned before the call"))
    commit(block, replace(one, object_key="in the block"))
    block.commit()
    expected = ["returned before the call", "in the block"]
    assert order(conn) == (expected[::-1] if wrote_before else expected)


def waits_for_lock(conn: Connection[Any], pid: int) -> Callable[[], bool]:
    def waits() -> bool:
        row = conn.execute("select wait_event_type = 'Lock' from pg_stat_activity where pid = %s", (pid,)).fetchone()
        return bool(row and row[0])

    return waits


@pytest.mark.parametrize("first_commits", [True, False])
@pytest.mark.parametrize("same_content", [True, False])
def test_a_concurrent_replay_waits_for_the_first(
    first_commits: bool,  # noqa: FBT001
    same_content: bool,  # noqa: FBT001
    connect: Connect,
    conn: Connection[TupleRow],
    commit: Commit,
) -> None:
    first, second = connect(autocommit=False), connect()
    other = Arguments() if same_content else Arguments(n_records=(1, 1, 1))
    first_id = commit(first, Arguments())
    with ThreadPoolExecutor(1) as threads:
        outcome = threads.submit(by_python, second, other)
        wait_until(waits_for_lock(conn, second.info.backend_pid))
        assert not outcome.done()
        if first_commits:
            first.commit()
        else:
            first.rollback()
        if first_commits and not same_content:
            with pytest.raises(CommitConflictError):
                outcome.result(10)
        else:
            second_id = outcome.result(10)
            assert (second_id == first_id) is first_commits
    objects, events = written(conn)
    assert (len(objects), len(events)) == (1, 3)
    assert [event[2] for event in events] == ([5, 6, 7] if first_commits or same_content else [1, 1, 1])


def test_a_commit_in_a_transaction_that_rolls_back(conn: Connection[TupleRow], commit: Commit) -> None:
    with conn.transaction(force_rollback=True):
        commit(conn, Arguments())
        assert len(written(conn)[1]) == 3
    assert written(conn) == ([], [])


def test_a_commit_in_a_savepoint_that_rolls_back(conn: Connection[TupleRow], commit: Commit) -> None:
    with conn.transaction():
        kept = commit(conn, Arguments(object_key="kept"))
        with conn.transaction(force_rollback=True):
            commit(conn, Arguments(object_key="dropped"))
    objects, events = written(conn)
    assert [row[:2] for row in objects] == [(kept, "kept")]
    assert len(events) == 3


def test_a_refused_commit_leaves_the_callers_transaction_usable_after_a_savepoint(
    conn: Connection[TupleRow], commit: Commit
) -> None:
    with conn.transaction():
        commit(conn, Arguments())
        with pytest.raises((UnknownPartitionError, psycopg.Error)), conn.transaction():
            commit(conn, Arguments(object_key="other", partition_ids=(1, UNKNOWN, 2)))
    assert len(written(conn)[0]) == 1


def test_a_connection_with_another_row_factory(conn: Connection[TupleRow]) -> None:
    conn.row_factory = dict_row  # type: ignore[assignment]
    object_id = by_python(conn, Arguments())
    assert by_python(conn, Arguments()) == object_id


def test_names_are_resolved_once(conn: Connection[TupleRow]) -> None:
    known = PartitionIds()
    assert list(known.get(conn, "orders")) == [1, 2]
    conn.close()
    assert list(known.get(conn, "orders")) == [1, 2]
