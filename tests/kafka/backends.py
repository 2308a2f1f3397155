"""What a broker stands on: Postgres for all that is to be known, a store for the bytes, Redis for hints."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from fsspec.core import url_to_fs
from kio.schema.errors import ErrorCode
from kio.static.primitive import i64
from psycopg import AsyncConnection
from psycopg.rows import namedtuple_row
from psycopg_pool import AsyncConnectionPool
from redis.asyncio import Redis, RedisError

Pool = AsyncConnectionPool[AsyncConnection[Any]]

# What Tidemark says, by verdict of a batch, error of a partition and SQLSTATE, as Kafka's clients know it.
ERRORS = {
    None: ErrorCode.none,
    "accepted": ErrorCode.none,
    "duplicate": ErrorCode.none,
    "malformed": ErrorCode.invalid_request,
    "unknown_partition": ErrorCode.unknown_topic_or_partition,
    "out_of_order_sequence": ErrorCode.out_of_order_sequence_number,
    "fenced_epoch": ErrorCode.invalid_producer_epoch,
    "offset_out_of_range": ErrorCode.offset_out_of_range,
    "offset_not_available": ErrorCode.offset_not_available,
    "22P02": ErrorCode.invalid_config,  # of Postgres: no number
    "TM003": ErrorCode.unknown_topic_or_partition,
    "TM004": ErrorCode.unknown_topic_or_partition,
    "TM005": ErrorCode.invalid_topic_exception,
    "TM006": ErrorCode.topic_already_exists,
    "TM007": ErrorCode.offset_out_of_range,
    "TM013": ErrorCode.unknown_producer_id,
    "TM014": ErrorCode.invalid_producer_epoch,
}
# No partition has this id.
UNKNOWN = 0
_POLL_SECONDS = 0.1

log = logging.getLogger(__name__)


def make_pool(url: str) -> Pool:
    return AsyncConnectionPool(url, kwargs={"autocommit": True, "row_factory": namedtuple_row}, max_size=16, open=False)


async def query(pool: Pool, statement: str, *parameters: Any) -> list[Any]:
    """The rows, with columns by name. A transaction of its own."""
    async with pool.connection() as conn:
        return await (await conn.execute(statement.encode(), parameters)).fetchall()


async def attempt(pool: Pool, statement: str, *parameters: Any) -> tuple[ErrorCode, str | None, Any]:
    """The value of a call; what Tidemark refuses comes as Kafka's error and Tidemark's words."""
    try:
        ((value,),) = await query(pool, statement, *parameters)
    except psycopg.Error as error:
        if error.sqlstate is None or error.sqlstate not in ERRORS:
            raise
        return ERRORS[error.sqlstate], error.diag.message_primary, None
    return ErrorCode.none, None, value


def known(value: int | None) -> i64:
    """Kafka's clients take -1 for what is not known (any more)."""
    return i64(-1 if value is None else value)


class Objects:
    """Objects in any store that fsspec knows, each written once and never changed."""

    def __init__(self, url: str) -> None:
        self._store, self._root = url_to_fs(url)
        self._store.makedirs(self._root, exist_ok=True)

    async def put(self, key: str, data: bytes) -> None:
        """Returns when it is durable. That is so in S3; local files are for tests, a machine that fails loses them."""
        await asyncio.to_thread(self._store.pipe_file, f"{self._root}/{key}", data)

    async def read(self, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """The bytes of each (key, byte offset, length)."""
        paths = [f"{self._root}/{key}" for key, _, _ in ranges]
        starts, ends = [start for _, start, _ in ranges], [start + length for _, start, length in ranges]
        found: list[bytes] = await asyncio.to_thread(self._store.cat_ranges, paths, starts, ends, on_error="raise")
        return found


class Moved:
    """Which partitions got offsets: workers say so on Redis, and whoever waits for some of them wakes up.

    A message is a hint. One that is lost, or a Redis that is away, costs a poll's time: then who waits asks Postgres.
    """

    def __init__(self, redis_url: str) -> None:
        self._redis_url = redis_url
        self._watches: dict[asyncio.Queue[set[int]], set[int] | None] = {}

    @contextmanager
    def watch(self, partition_ids: set[int] | None = None) -> Iterator[Callable[[float], Awaitable[set[int]]]]:
        """Watch some partitions, or all. It begins before the owner looks for the first time, so nothing is missed.

        Call what it gives to wait: for what has moved since the last call, or nothing after these seconds or a poll's.
        """
        queue: asyncio.Queue[set[int]] = asyncio.Queue()

        async def wait(seconds: float) -> set[int]:
            moved: set[int] = set()
            with suppress(TimeoutError):
                moved |= await asyncio.wait_for(queue.get(), min(seconds, _POLL_SECONDS))
            while not queue.empty():
                moved |= queue.get_nowait()
            return moved

        self._watches[queue] = partition_ids
        try:
            yield wait
        finally:
            del self._watches[queue]

    async def run(self) -> None:
        while True:
            try:
                async with Redis.from_url(self._redis_url) as redis, redis.pubsub() as channel:
                    await channel.subscribe("tidemark:moved")
                    async for message in channel.listen():
                        moved = set(json.loads(message["data"])) if message["type"] == "message" else set()
                        for queue, partition_ids in self._watches.items():
                            if found := moved if partition_ids is None else moved & partition_ids:
                                queue.put_nowait(found)
            except RedisError as error:
                log.warning("no word from workers, offsets are polled for: %s", error)
                await asyncio.sleep(1)
