"""Brokers and topics: who is there, who leads what, and what administrators ask for."""

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import attrgetter

from kio.schema.create_partitions.v1.response import CreatePartitionsResponse, CreatePartitionsTopicResult
from kio.schema.create_topics.v4.response import CreatableTopicResult, CreateTopicsResponse
from kio.schema.delete_records.v1 import response as deleted
from kio.schema.delete_topics.v3.response import DeletableTopicResult, DeleteTopicsResponse
from kio.schema.errors import ErrorCode
from kio.schema.metadata.v5 import response as kafka
from kio.schema.types import TopicName
from kio.static.primitive import i32

from tests.kafka.backends import UNKNOWN, Pool, attempt, known, query
from tests.kafka.server import NO_THROTTLE, Request

_LIST = "select name, partition_ids from tidemark.list_topics(names => %s::text[], after => %s)"
_CREATE = "select tidemark.create_topic(%s, %s, retention_ms => %s::bigint, retention_bytes => %s::bigint)"
_ALIVE_SECONDS, _CONNECT_SECONDS = 1.0, 0.2


Node = kafka.MetadataResponseBroker


class Cluster:
    """The brokers, as the command line names them. Those that take no connection are not shown to clients."""

    def __init__(self, own: Node, peers: Sequence[Node]) -> None:
        self._own = own
        self._peers = peers
        self._alive = [own]
        self._until = 0.0

    async def alive(self) -> list[Node]:
        """By id, ourselves among them; asked for once a second."""
        now = asyncio.get_running_loop().time()
        if now > self._until:
            self._until = now + _ALIVE_SECONDS
            answers = await asyncio.gather(*map(self._answers, self._peers))
            alive = [self._own, *(peer for peer, there in zip(self._peers, answers, strict=True) if there)]
            self._alive = sorted(alive, key=attrgetter("node_id"))
        return self._alive

    @staticmethod
    async def _answers(peer: Node) -> bool:
        with suppress(OSError):
            async with asyncio.timeout(_CONNECT_SECONDS):
                _, writer = await asyncio.open_connection(peer.host, peer.port)
            writer.close()
            return True
        return False


@dataclass(frozen=True)
class Topics:
    """The ids of partitions, by topic and number. They never change, so they are looked up once."""

    pool: Pool
    found: dict[str, list[int]] = field(default_factory=dict)

    async def ids(self, partitions: Iterable[tuple[str, int]]) -> list[int]:
        """In the order given; UNKNOWN for what does not exist: Tidemark says so, in its place, to whoever asks."""
        wanted = list(partitions)
        if missing := {topic for topic, number in wanted if number >= len(self.found.get(topic, ()))}:
            await self.list(sorted(missing))
        found = [self.found.get(topic, ())[number : number + 1] if number >= 0 else () for topic, number in wanted]
        return [one[0] if one else UNKNOWN for one in found]

    async def list(self, names: "list[str] | None" = None) -> dict[str, "list[int]"]:
        """Topics, and the ids of their partitions: those of these names, or all."""
        found: dict[str, list[int]] = {}
        while rows := await query(self.pool, _LIST, names, max(found, default="")):
            found |= {row.name: row.partition_ids for row in rows}
        self.found.update(found)
        return found

    def forget(self, topic: str) -> None:
        """It may be deleted, and another one have its name."""
        self.found.pop(topic, None)


@dataclass(frozen=True)
class Administration:
    pool: Pool
    topics: Topics
    cluster: Cluster

    async def metadata(self, request: Request) -> kafka.MetadataResponse:
        """Any broker serves any partition. To lead one is to get its requests, so that each broker gets its share."""
        names = None if request.topics is None else [str(topic.name) for topic in request.topics]
        found = await self.topics.list(names)
        brokers = await self.cluster.alive()

        def partition(n: int) -> kafka.MetadataResponsePartition:
            leader = brokers[n % len(brokers)].node_id
            return kafka.MetadataResponsePartition(error_code=ErrorCode.none, partition_index=i32(n), leader_id=leader)

        topics = [
            kafka.MetadataResponseTopic(
                error_code=ErrorCode.none if name in found else ErrorCode.unknown_topic_or_partition,
                name=TopicName(name),
                partitions=tuple(map(partition, range(len(found.get(name, ()))))),
            )
            for name in (found if names is None else names)
        ]
        return kafka.MetadataResponse(
            throttle_time=NO_THROTTLE, brokers=tuple(brokers), controller_id=brokers[0].node_id, topics=tuple(topics)
        )

    async def create_topics(self, request: Request) -> CreateTopicsResponse:
        results = []
        for topic in request.topics:
            limits = {config.name: None if config.value == "-1" else config.value for config in topic.configs}
            ms, size = limits.pop("retention.ms", None), limits.pop("retention.bytes", None)
            wrong = (ErrorCode.invalid_config, f"{', '.join(limits)} cannot be set")
            error, message = wrong if limits else (ErrorCode.none, None)
            if not limits and not request.validate_only:
                error, message, _ = await attempt(self.pool, _CREATE, topic.name, topic.num_partitions, ms, size)
            results.append(CreatableTopicResult(name=topic.name, error_code=error, error_message=message))
        return CreateTopicsResponse(throttle_time=NO_THROTTLE, topics=tuple(results))

    async def create_partitions(self, request: Request) -> CreatePartitionsResponse:
        results = []
        for topic in request.topics:
            error, message, _ = await attempt(
                self.pool, "select tidemark.add_partitions(%s, %s)", topic.name, topic.count
            )
            error = ErrorCode.invalid_partitions if error == ErrorCode.invalid_topic_exception else error
            results.append(CreatePartitionsTopicResult(name=topic.name, error_code=error, error_message=message))
        return CreatePartitionsResponse(throttle_time=NO_THROTTLE, results=tuple(results))

    async def delete_topics(self, request: Request) -> DeleteTopicsResponse:
        results = []
        for name in request.topic_names:
            error, _, _ = await attempt(self.pool, "select tidemark.delete_topic(%s)", name)
            results.append(DeletableTopicResult(name=name, error_code=error))
        return DeleteTopicsResponse(throttle_time=NO_THROTTLE, responses=tuple(results))

    async def delete_records(self, request: Request) -> deleted.DeleteRecordsResponse:
        ids = iter(await self.topics.ids((t.name, p.partition_index) for t in request.topics for p in t.partitions))

        async def delete(asked: Request) -> deleted.DeleteRecordsPartitionResult:
            error, _, low = await attempt(self.pool, "select tidemark.delete_records(%s, %s)", next(ids), asked.offset)
            return deleted.DeleteRecordsPartitionResult(
                partition_index=asked.partition_index, low_watermark=known(low), error_code=error
            )

        topics = [
            deleted.DeleteRecordsTopicResult(name=t.name, partitions=tuple([await delete(p) for p in t.partitions]))
            for t in request.topics
        ]
        return deleted.DeleteRecordsResponse(throttle_time=NO_THROTTLE, topics=tuple(topics))
