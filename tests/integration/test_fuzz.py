"""Every public function, with arguments nobody would think of: it answers, or says by name what is wrong with them.

The functions are those that a producer or a consumer may call, and those that docs/brokers.md lists; so a new one is
tried as soon as it is one of them. Most calls are valid ones with one thing changed, which gets further than noise.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, date, datetime
from decimal import Decimal
from itertools import count
from typing import Any
from uuid import UUID

import psycopg
from hypothesis import given, note
from hypothesis import strategies as st
from psycopg.pq import TransactionStatus

from config.errors import TidemarkError
from db.audit import audit
from db.commit import Batch, commit_batches, commit_object
from db.fetch import FetchRequest, fetch_batches, fetch_partitions, list_offsets
from db.materialize import materialize
from db.objects import (
    condemn,
    find_live_objects,
    find_objects,
    forget_dead_objects,
    list_dead_objects,
    take_dead_objects,
)
from db.producers import expire_producers, init_producer, producer_states
from db.receipts import receipts
from db.retention import delete_records, purge, retain
from db.topics import add_partitions, create_topic, delete_topic, list_topics, names_of, partition_ids, set_retention
from tests.integration.conftest import ROOT, commit, examples, make_topic

Conn = psycopg.Connection[Any]

DOCUMENTED = re.findall(r"^\| `(\w+)\(", (ROOT / "docs/brokers.md").read_text(), re.MULTILINE)

# Ours, and those that docs/brokers.md names beside them.
NAMED = re.compile("TM0[0-9]{2}|40001")
# What Postgres says of a value that is none of the argument's type; no function has run then.
NO_SUCH_VALUE = re.compile("22...")

_INTS = [0, 1, 2, 3, -1, -2, -3, 99, 32767, 32768, 65535, 65536, 100_001, 2**31 - 1, -(2**31)]
_BIGINTS = [*_INTS, 2**31, 2**32, 2**47, 2**62, 2**63 - 1, -(2**63), 253402300799999, 253402300800000]
_TEXTS = [
    *("", "orders", "orders.new", "orders_new", "key", "a", ".", "..", " ", "'", '"', "\\", "%", "%s %I", "{}", "NULL"),
    *("\n", "orders\n", "\x01", "\x7f", "\u0085", "\u202e", "\ufeff", "\U0001f600", "é", "é" * 512, "k" * 249),
    *("k" * 250, "k" * 1024, "k" * 1025, "x" * 100_000),
]
_UUIDS = [UUID(int=0), UUID(int=2**128 - 1), UUID("01234567-89ab-cdef-0123-456789abcdef")]
# Some are of another type: Postgres refuses them before the function is called.
_BY_TYPE: dict[str, list[Any]] = {
    "integer": [*_INTS, "NaN", 2**31],
    "bigint": [*_BIGINTS, "NaN", "Infinity", 2**63],
    "text": _TEXTS,
    "uuid": [*_UUIDS, "x"],
    "boolean": [True, False],
}
# Arguments that are right, by their names. A function with others gets noise alone.
_VALID: dict[str, Any] = (
    {"n_records": [2, 3], "byte_offsets": [0, 10], "byte_lengths": [10, 10], "max_timestamps": [0, 1000]}
    | {"producer_ids": [None, 1], "producer_epochs": [None, 0], "base_sequences": [None, 0]}
    | {"from_offset": 1, "from_offsets": [0, 1], "max_bytes": 1000, "max_batches": 10, "partition_max_bytes": [100, 9]}
    | {"at_least_one": True, "timestamps": [-1, 0], "first_offset": 5, "before_offset": 1, "partition": 0}
    | {"known_id": 1, "known_epoch": 0, "before_id": 10, "at_most": 5, "moved": None, "keys": ["a", "b"]}
    | {"topic": "orders", "names": ["orders"], "ids": None, "after": "", "id": None, "partitions": 5}
    | {"retention_ms": 1000, "retention_bytes": None}
)


@dataclass(frozen=True)
class Function:
    oid: int
    name: str
    arguments: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.name}({', '.join(kind for _, kind in self.arguments)})"


def public_functions(conn: Conn) -> list[Function]:
    rows = conn.execute(
        "select p.oid, p.proname, array(select coalesce(p.proargnames[a.n], '') "
        "from generate_series(1, p.pronargs) a(n)), array(select format_type(t.type, null) "
        "from unnest(p.proargtypes::oid[]) with ordinality t(type, n) order by t.n) "
        "from pg_proc p where p.pronamespace = 'tidemark'::regnamespace and (p.proname = any(%s) or exists ("
        "select from aclexplode(p.proacl) g "
        "where g.grantee in (to_regrole('tidemark_producer'), to_regrole('tidemark_consumer')))) "
        "order by p.proname, p.oid",
        (DOCUMENTED,),
    )
    return [Function(oid, name, tuple(zip(names, kinds, strict=True))) for oid, name, names, kinds in rows]


# --- Arguments, as the text that Postgres reads


def literal(value: Any) -> str | None:
    """As Postgres reads it; lists are arrays."""
    if isinstance(value, list):
        return "{" + ",".join(element(each) for each in value) + "}"
    return None if value is None else str(value)


def element(value: Any) -> str:
    text = literal(value)
    if text is None or isinstance(value, list):
        return text or "NULL"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def of_type(kind: str) -> st.SearchStrategy[str | None]:
    if not kind.endswith("[]"):
        return st.none() | st.sampled_from(_BY_TYPE[kind]).map(literal)
    one = st.none() | st.sampled_from(_BY_TYPE[kind.removesuffix("[]")][:-2])
    several = st.lists(one, max_size=4)
    return st.one_of(
        st.none(),
        *[several.map(literal)] * 4,
        # Of two dimensions.
        st.integers(1, 3)
        .flatmap(lambda n: st.lists(st.lists(one, min_size=n, max_size=n), min_size=1, max_size=3))
        .map(literal),
        st.tuples(st.sampled_from([-(2**31), -5, 0, 2, 2**31 - 3]), st.lists(one, min_size=1, max_size=2)).map(shifted),
        st.tuples(one, st.sampled_from([64, 1000, 10_000, 10_001, 65_537, 100_000])).map(
            lambda t: literal([t[0]] * t[1])
        ),
    )


def shifted(bounds: tuple[int, list[Any]]) -> str:
    lower, values = bounds
    return f"[{lower}:{lower + len(values) - 1}]={literal(values)}"


def changed(kind: str, value: Any) -> st.SearchStrategy[str | None]:
    """Another value in its place, or a list with one element changed."""
    if not isinstance(value, list) or not value:
        return of_type(kind)
    elements = st.none() | st.sampled_from(_BY_TYPE[kind.removesuffix("[]")])
    places = st.tuples(st.integers(0, len(value)), elements)
    replaced = places.map(lambda t: literal([*value[: t[0]], t[1], *value[t[0] + 1 :]]))
    return st.one_of(replaced, replaced, st.just(shifted((7, value))), of_type(kind))


def calls(function: Function, valid: dict[str, Any]) -> st.SearchStrategy[list[str | None]]:
    noise = st.tuples(*(of_type(kind) for _, kind in function.arguments)).map(list)
    known = [valid.get(name, ...) for name, _ in function.arguments]
    if ... in known or not known:
        return noise
    right = [literal(value) for value in known]
    one_changed = st.integers(0, len(known) - 1).flatmap(
        lambda n: changed(function.arguments[n][1], known[n]).map(lambda value: [*right[:n], value, *right[n + 1 :]])
    )
    # All arrays longer, to the same length.
    longer = st.sampled_from([2, 64, 1000, 50_000]).map(
        lambda n: [literal(value * n if isinstance(value, list) else value) for value in known]
    )
    return st.one_of(*[one_changed] * 9, longer, noise, noise)


# --- What the functions run in


def world(conn: Conn, function: Function, fresh: Iterator[int]) -> dict[str, Any]:
    """A topic with batches and some that have no offset; returns arguments that are right for the function."""
    rows = conn.execute("select tidemark.partition_ids(name) from tidemark.topics where name = 'orders'").fetchall()
    ids = rows[0][0][:2] if rows else make_topic(conn, partitions=2)
    if not rows:
        commit(conn, f"first {next(fresh)}", [*ids, *ids], 3)
        materialize(conn, ids)
        commit(conn, f"pending {next(fresh)}", ids)
    objects = [row[0] for row in conn.execute("select id from tidemark.objects order by id desc limit 2")]
    empty = make_topic(conn, f"empty-{next(fresh)}") if function.name == "begin_at" else []
    return {
        **_VALID,
        "object_key": f"key {next(fresh)}",
        "name": f"topic-{next(fresh)}",
        "partition_ids": ids,
        "partition_id": (empty or ids)[0],
        "object_ids": objects,
    }


def digest(conn: Conn, tables: Sequence[str]) -> Any:
    counts = ", ".join(f"(select count(*) from tidemark.{table})" for table in tables)
    return conn.execute(f"select {counts}".encode()).fetchone()


def try_call(conn: Conn, function: Function, arguments: list[str | None], tables: Sequence[str]) -> str:
    """Call it in a savepoint; returns what became of it. A defect is an AssertionError."""
    # A hundred thousand partitions are allowed, and take a second.
    arguments = [
        "0" if name == "partitions" and a and len(a) == 5 else a
        for (name, _), a in zip(function.arguments, arguments, strict=True)
    ]
    marks = ", ".join(f"%s::{kind}" for _, kind in function.arguments)
    shown = [a if a is None or len(a) < 100 else f"{a[:100]}…" for a in arguments]
    with conn.transaction():
        before = digest(conn, tables)
        said: psycopg.Error | None = None
        try:
            with conn.transaction():
                conn.execute(f"select * from tidemark.{function.name}({marks})".encode(), arguments).fetchall()
        except psycopg.Error as error:
            said = error
        if not said:
            return "answered"
        assert digest(conn, tables) == before, shown
    found, hint, context = said.diag.sqlstate or "", said.diag.message_hint, said.diag.context or ""
    text = f"{function}: {shown}: {found} {said}"
    if NO_SUCH_VALUE.fullmatch(found):
        # One from within a function would say so.
        assert "function" not in context, text
        return "no such value"
    assert NAMED.fullmatch(found), text
    assert hint, text
    assert len(text) < 4000, text
    return found


def fuzz(conn: Conn, function: Function, tables: Sequence[str], fresh: Iterator[int], tried: Counter[str]) -> None:
    @examples(25)
    @given(st.data())
    def call(data: st.DataObject) -> None:
        valid = world(conn, function, fresh)
        outcome = try_call(conn, function, data.draw(calls(function, valid)), tables)
        tried.update([outcome, str(function)])

    call()


def test_every_public_function_answers_or_names_what_is_wrong(conn: Conn) -> None:
    functions = public_functions(conn)
    assert {f.name for f in functions} == set(DOCUMENTED), "docs/brokers.md lists what a broker may call"
    tables = [r[0] for r in conn.execute("select tablename from pg_tables where schemaname = 'tidemark' order by 1")]
    fresh = count()
    tried: Counter[str] = Counter()
    for function in functions:
        fuzz(conn, function, tables, fresh, tried)
        # Nothing that was answered may stop a partition.
        ids = [row[0] for row in conn.execute("select id from tidemark.topic_partitions order by id limit 1000")]
        assert not materialize(conn, ids).backlog_partition_ids, function
    assert audit(conn, from_scratch=True).violations == ()
    assert tried["answered"] > len(functions), tried
    assert {code for code in tried if code.startswith("TM")} >= {"TM001", "TM003", "TM004", "TM005", "TM007", "TM009"}


# --- The same through Python

_NO_VALUES: list[Any] = [
    *(None, True, -1, 2**31, 2**63, 2**64, 10**30, 1.5, float("nan"), float("inf"), Decimal(1), 1j),
    *("", "x", "\0", "\ud800", b"x", bytearray(b"x"), [], [None], ["a"], ["\0"], ["\ud800"], [b"x"], [1.5], [2**31]),
    *([2**63], [-(2**63) - 1], [[1]], {}, {"a": 1}, (), object(), [object()], [UUID(int=0)], UUID(int=0)),
    *(datetime.now(UTC), date.min, range(3), int, [Batch], [True]),
]


def batch_of(changes: dict[str, Any]) -> Batch:
    right = Batch(partition_id=1, n_records=1, byte_offset=0, byte_length=1, max_timestamp=0)
    return replace(right, **{"producer_id": 1, "producer_epoch": 0, "base_sequence": 0, **changes})


# By its arguments that are right.
_WRAPPERS: list[tuple[Callable[..., Any], dict[str, Any]]] = [
    (lambda c, **b: commit_batches(c, "o", [batch_of(b)]), {f.name: 0 for f in fields(Batch)}),
    (commit_batches, {"object_key": "k", "batches": []}),
    (
        commit_object,
        {"object_key": "k", "partition_ids": [1], "n_records": [1], "byte_offsets": [1], "byte_lengths": [1]}
        | {"max_timestamps": [1]},
    ),
    (fetch_batches, {"partition_id": 1, "from_offset": 0, "max_bytes": 1, "max_batches": 1}),
    (
        lambda c, a, b, d, **limits: fetch_partitions(c, [FetchRequest(a, b, d)], **limits),
        {"a": 1, "b": 0, "d": 1, "max_bytes": 1, "max_batches": 1},
    ),
    (fetch_partitions, {"requests": []}),
    (list_offsets, {"partition_ids": [1], "times": [-1]}),
    (receipts, {"object_ids": [1], "moved": None}),
    (init_producer, {"producer_id": None, "producer_epoch": None}),
    (producer_states, {"partition_id": 1, "before": None, "limit": 1}),
    (expire_producers, {"silent_seconds": 3600.0, "from_partition_id": 5}),
    (create_topic, {"name": "t", "partitions": 1, "topic_id": None, "retention_ms": None, "retention_bytes": None}),
    (add_partitions, {"topic": "t", "partitions": 2}),
    (delete_topic, {"topic": "t"}),
    (list_topics, {"names": None, "ids": None, "after": "", "limit": 5}),
    (partition_ids, {"topic": "t"}),
    (names_of, {"ids": [1]}),
    (set_retention, {"topic": "t", "retention_ms": None, "retention_bytes": None}),
    (delete_records, {"partition_id": 1, "before_offset": 0}),
    (retain, {"delete_batch": 5, "after_partition_id": 0}),
    (purge, {"delete_batch": 5}),
    (condemn, {"keys": ["k"]}),
    (list_dead_objects, {"limit": 1, "older_than_seconds": 1.0, "after_object_id": 0}),
    (take_dead_objects, {"limit": 1, "older_than_seconds": 1.0}),
    (forget_dead_objects, {"ids": [1]}),
    (find_objects, {"after_key": "", "limit": 1}),
    (find_live_objects, {"keys": ["k"]}),
    (materialize, {"partition_ids": [1], "events_per_partition": 5, "strategy": "window", "wait": True}),
]


@examples(200)
@given(st.data())
def test_python_says_what_is_wrong_with_an_argument(conn: Conn, data: st.DataObject) -> None:
    call, arguments = data.draw(st.sampled_from(_WRAPPERS))
    name = data.draw(st.sampled_from(sorted(arguments)))
    value = data.draw(st.sampled_from(_NO_VALUES))
    said = "no error, or one that says more than its class"
    try:
        call(conn, **{**arguments, name: value})
    except UnicodeError as error:
        said = ""
        note(str(error))
    except (TidemarkError, TypeError, ValueError) as error:
        said = str(error)
    assert said.count(" ") > 1, (call, name, value)
    assert conn.info.transaction_status == TransactionStatus.IDLE
