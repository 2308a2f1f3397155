"""Produce: the batches of all clients are gathered into one object, which is uploaded and committed.

- Order: batches are committed in the order of their arrival, one object after the other. Else the sequences of an
  idempotent producer, which has several requests under way, would come out of order.
- An answer says where in the log the batch is, so it waits until a worker has placed it.
- A crash leaves an object without a commit, which `tasks.reconcile` deletes, or a commit without an answer: the client
  sends the batch again, here or elsewhere, and is told the offset of the first one.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple
from uuid import uuid4

import psycopg
from kio.schema.errors import ErrorCode
from kio.schema.init_producer_id.v4 import InitProducerIdResponse
from kio.schema.produce.v7.response import PartitionProduceResponse, ProduceResponse, TopicProduceResponse
from kio.static.primitive import i64

from db.translate import is_transient
from tests.kafka.backends import ERRORS, Moved, Objects, Pool, attempt, known, query
from tests.kafka.metadata import Topics
from tests.kafka.records import BatchHeader, read_header
from tests.kafka.server import NO_THROTTLE, Request

_INIT = "select array[producer_id, producer_epoch] from tidemark.init_producer(%s, %s)"
_COMMIT = """
select object_id, verdicts from tidemark.commit_batches(
    %s, %s::int[], %s::int[], %s::bigint[], %s::int[], %s::bigint[], %s::bigint[], %s::int[], %s::int[])
"""
_RECEIPTS = "select * from tidemark.receipts(%s::bigint[], %s::int[]) where not is_pending"
_OBJECT_BYTES, _OBJECT_BATCHES = 8 * 2**20, 10_000

# After so long it is asked for all that is pending, however many hints there are.
_ALL_SECONDS = 0.5

log = logging.getLogger(__name__)

# The error and the base offset of a batch.
Answer = asyncio.Future[tuple[ErrorCode, int]]


def give(answer: Answer, error: ErrorCode, base_offset: int = -1) -> None:
    """Whoever waited may have gone."""
    if not answer.done():
        answer.set_result((error, base_offset))


class _Batch(NamedTuple):
    topic: str
    partition: int
    data: bytes
    header: BatchHeader
    arrived: float
    answer: Answer


@dataclass(frozen=True)
class Producing:
    pool: Pool
    topics: Topics
    objects: Objects
    moved: Moved
    # Called with the partitions of a commit, to wake a worker.
    wake: Callable[[Iterable[int]], None]
    linger_seconds: float
    queue: asyncio.Queue[_Batch] = field(default_factory=asyncio.Queue)
    # What is committed and has no offset yet: by object, and in it by the place of the batch, from 1.
    pending: dict[int, dict[int, Answer]] = field(default_factory=dict)

    async def init_producer_id(self, request: Request) -> InitProducerIdResponse:
        # Before version 3 no client can go on with an id.
        own_id, epoch = getattr(request, "producer_id", -1), getattr(request, "producer_epoch", -1)
        error, new = ErrorCode.invalid_request, None
        if request.transactional_id is None:
            error, _, new = await attempt(self.pool, _INIT, *((own_id, epoch) if own_id >= 0 else (None, None)))
        own = {"producer_id": new[0], "producer_epoch": new[1]} if new else {"producer_epoch": -1}
        return InitProducerIdResponse(throttle_time=NO_THROTTLE, error_code=error, **own)

    async def produce(self, request: Request) -> ProduceResponse | None:
        # Nothing is waited for until all are in the queue: those of the next request come behind them.
        asked = [(topic.name, partition) for topic in request.topic_data for partition in topic.partition_data]
        answers = [self._take(topic, partition.index, partition.records) for topic, partition in asked]
        if request.acks == 0:
            return None
        if answers:
            await asyncio.wait(answers, timeout=request.timeout.total_seconds())
        left = iter(answers)

        def response(partition: Request) -> PartitionProduceResponse:
            # Late is not lost: sent again it is a duplicate, and of a producer that is not idempotent, there twice.
            error, offset = answer.result() if (answer := next(left)).done() else (ErrorCode.request_timed_out, -1)
            return PartitionProduceResponse(index=partition.index, error_code=error, base_offset=i64(offset))

        topics = [
            TopicProduceResponse(name=topic.name, partition_responses=tuple(map(response, topic.partition_data)))
            for topic in request.topic_data
        ]
        return ProduceResponse(responses=tuple(topics))

    def _take(self, topic: str, partition: int, data: bytes | None) -> Answer:
        loop, header = asyncio.get_running_loop(), read_header(data)
        answer: Answer = loop.create_future()
        if data is None or header is None:
            give(answer, ErrorCode.corrupt_message)
        else:
            self.queue.put_nowait(_Batch(topic, partition, data, header, loop.time(), answer))
        return answer

    async def commit(self) -> None:
        """Commit what comes, for ever."""
        while True:
            batches = await self._gather()
            try:
                await self._commit(batches)
            except Exception:
                log.exception("%s batches are not committed", len(batches))
                for batch in batches:
                    # The client sends it again.
                    give(batch.answer, ErrorCode.kafka_storage_error)

    async def acknowledge(self) -> None:
        """Answer what has got its offset, for ever: one question for all that is pending."""
        clock = asyncio.get_running_loop().time
        asked_for_all = clock()
        with self.moved.watch() as wait:
            while True:
                hint: list[int] | None = list(await wait(1))
                if not hint or clock() > asked_for_all + _ALL_SECONDS:
                    # Without a hint, for all: also for those whose hint was lost, or that retention has deleted.
                    hint, asked_for_all = None, clock()
                try:
                    ids = list(self.pending)
                    rows = await query(self.pool, _RECEIPTS, ids, hint) if ids else []
                except psycopg.OperationalError as error:
                    log.warning("offsets are asked for again: %s", error)
                    continue
                for row in rows:
                    answers = self.pending[row.object_id]
                    if row.batch in answers:
                        give(answers.pop(row.batch), ErrorCode.none, known(row.base_offset))
                for object_id in {row.object_id for row in rows if not self.pending[row.object_id]}:
                    del self.pending[object_id]

    async def _gather(self) -> list[_Batch]:
        """One at least, and all that come until it has lingered, or the object is full."""
        batches = [await self.queue.get()]
        size = len(batches[0].data)
        with suppress(TimeoutError):
            async with asyncio.timeout_at(batches[0].arrived + self.linger_seconds):
                while size < _OBJECT_BYTES and len(batches) < _OBJECT_BATCHES:
                    batches.append(await self.queue.get())
                    size += len(batches[-1].data)
        return batches

    async def _commit(self, batches: list[_Batch]) -> None:
        ids = await self.topics.ids((batch.topic, batch.partition) for batch in batches)
        key, lengths = uuid4().hex, [len(batch.data) for batch in batches]
        await self.objects.put(key, b"".join(batch.data for batch in batches))
        offsets = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        records, times, *sequences = (list(column) for column in zip(*(b.header for b in batches), strict=True))
        row = await self._commit_object(key, ids, records, offsets, lengths, times, *sequences)
        accepted = {}
        for place, (batch, verdict) in enumerate(zip(batches, row.verdicts, strict=True), 1):
            if ERRORS[verdict] == ErrorCode.none:
                accepted[place] = batch.answer
            else:
                self.topics.forget(batch.topic)
                give(batch.answer, ERRORS[verdict])
        if accepted:
            self.pending[row.object_id] = accepted
            self.wake({ids[place - 1] for place in accepted})

    async def _commit_object(self, key: str, *arrays: list[int]) -> Any:
        """The commit's answer. It is repeated until there is one: with the same key it is the same commit."""
        pause = 0.01
        while True:
            try:
                (row,) = await query(self.pool, _COMMIT, key, *arrays)
                return row
            except psycopg.Error as error:
                # One is 40001: another broker has committed batches of the same producer at this moment.
                if not is_transient(error):
                    raise
                log.warning("the commit of object %s is repeated: %s", key, error)
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1)
