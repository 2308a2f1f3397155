"""Fetch and ListOffsets: where the batches are stands in Postgres, their bytes are in the objects."""

import asyncio
from dataclasses import dataclass
from typing import Any

from kio.schema.errors import ErrorCode
from kio.schema.fetch.v11.response import FetchableTopicResponse, FetchResponse, PartitionData
from kio.schema.list_offsets.v3 import response as kafka
from kio.static.primitive import Records

from tests.kafka.backends import ERRORS, Moved, Objects, Pool, known, query
from tests.kafka.metadata import Topics
from tests.kafka.records import with_base_offset
from tests.kafka.server import NO_THROTTLE, Request

_FETCH = "select * from tidemark.fetch_partitions(%s::int[], %s::bigint[], %s::bigint[], %s, max_batches => 1000)"
_LIST_OFFSETS = "select * from tidemark.list_offsets(%s::int[], %s::bigint[])"


@dataclass(frozen=True)
class Fetching:
    pool: Pool
    topics: Topics
    objects: Objects
    moved: Moved

    async def fetch(self, request: Request) -> FetchResponse:
        """Waits until there are min_bytes, or an error to tell, or max_wait is over."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + request.max_wait.total_seconds()
        asked = [(topic.topic, partition) for topic in request.topics for partition in topic.partitions]
        ids = await self.topics.ids((topic, p.partition) for topic, p in asked)
        offsets = [p.fetch_offset for _, p in asked]
        limits = [max(1, p.partition_max_bytes) for _, p in asked]
        with self.moved.watch(set(ids)) as wait:
            while True:
                rows = await query(self.pool, _FETCH, ids, offsets, limits, max(1, request.max_bytes))
                left = deadline - clock()
                enough = sum(row.byte_length or 0 for row in rows) >= request.min_bytes
                if enough or left <= 0 or any(row.error for row in rows):
                    break
                await wait(left)
        ranges = [(row.object_key, row.byte_offset, row.byte_length) for row in rows if row.object_key]
        data = iter(await self.objects.read(ranges) if ranges else ())
        # Of each partition asked for there is one row at least.
        found: dict[int, tuple[Any, bytearray]] = {}
        for row in rows:
            _, records = found.setdefault(row.request, (row, bytearray()))
            if row.object_key:
                records += with_base_offset(next(data), row.start_offset)
        answers = (self._partition(*one, *found[n]) for n, one in enumerate(asked, 1))
        topics = [
            FetchableTopicResponse(topic=topic.topic, partitions=tuple(next(answers) for _ in topic.partitions))
            for topic in request.topics
        ]
        return FetchResponse(throttle_time=NO_THROTTLE, error_code=ErrorCode.none, responses=tuple(topics))

    def _partition(self, topic: str, asked: Any, row: Any, records: bytearray) -> PartitionData:
        if row.error == "unknown_partition":
            self.topics.forget(topic)
        start, end = known(row.log_start), known(row.log_end)
        return PartitionData(
            partition_index=asked.partition,
            error_code=ERRORS[row.error],
            high_watermark=end,
            last_stable_offset=end,
            log_start_offset=start,
            aborted_transactions=None,
            records=Records(bytes(records)),
        )

    async def list_offsets(self, request: Request) -> kafka.ListOffsetsResponse:
        ids = await self.topics.ids((t.name, p.partition_index) for t in request.topics for p in t.partitions)
        times = [p.timestamp for t in request.topics for p in t.partitions]
        rows = iter(await query(self.pool, _LIST_OFFSETS, ids, times))

        def answer(asked: Request) -> kafka.ListOffsetsPartitionResponse:
            row = next(rows)
            at, offset = known(row.max_timestamp), known(row.log_offset)
            return kafka.ListOffsetsPartitionResponse(
                partition_index=asked.partition_index, error_code=ERRORS[row.error], timestamp=at, offset=offset
            )

        topics = [
            kafka.ListOffsetsTopicResponse(name=topic.name, partitions=tuple(map(answer, topic.partitions)))
            for topic in request.topics
        ]
        return kafka.ListOffsetsResponse(throttle_time=NO_THROTTLE, topics=tuple(topics))
