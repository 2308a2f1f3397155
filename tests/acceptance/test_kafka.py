"""The example broker (tests/kafka) under Kafka's own clients: librdkafka (confluent-kafka) and aiokafka."""

import asyncio
import socket
import struct
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from io import BytesIO
from typing import Any, TypeVar

import psycopg
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka import TopicPartition as AioPartition
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions, NewTopic
from kio.schema.api_versions import v0 as api_versions_v0
from kio.schema.api_versions import v4 as api_versions_v4
from kio.schema.errors import ErrorCode
from kio.schema.init_producer_id.v4 import InitProducerIdRequest, InitProducerIdResponse
from kio.schema.produce.v7 import ProduceRequest, ProduceResponse
from kio.schema.produce.v7.request import PartitionProduceData, TopicProduceData
from kio.schema.types import TopicName
from kio.serial import entity_reader, entity_writer
from kio.static.primitive import Records, i16, i32, i32Timedelta
from psycopg import Connection
from psycopg.rows import TupleRow
from redis import Redis

from config.errors import UnknownTopicError
from db.topics import partition_ids
from tasks.app import TidemarkApp
from tasks.maintenance import retain
from tests.acceptance.conftest import Place, Programs
from tests.demo.programs import Process, free_port
from tests.servers import PostgresServer, RedisServer
from tests.support import wait_until
from tests.support_commands import app_for

SECONDS = 20.0
T = TypeVar("T")


class Brokers:
    """Two brokers that know of each other, over one store; a worker, and clients."""

    def __init__(self, programs: Programs, app: TidemarkApp, conn: Connection[TupleRow]) -> None:
        self.programs = programs
        self.app = app
        self.conn = conn
        worker = programs.worker(wait=False)
        ports = [free_port(), free_port()]
        self.address = ",".join(f"127.0.0.1:{port}" for port in ports)
        self.processes = [self._broker(programs, node, ports) for node in range(len(ports))]
        for process in self.processes:
            self.wait_for(process)
        programs.ready(worker)
        self.admin = AdminClient({"bootstrap.servers": self.address})

    @staticmethod
    def _broker(programs: Programs, node: int, ports: list[int]) -> Process:
        peers = [f"{other}={port}" for other, port in enumerate(ports) if other != node]
        options = ["--node", str(node), "--port", str(ports[node]), "--store", str(programs.logs / "objects")]
        return programs.process(f"broker{node}", [sys.executable, "-m", "tests.kafka", *options, "--peers", *peers])

    @staticmethod
    def wait_for(process: Process, starts: int = 1) -> None:
        def the_broker_listens() -> bool:
            process.require_well()
            return process.output().count(" listens on ") == starts

        wait_until(the_broker_listens)

    def create(self, topic: str, partitions: int = 1, config: dict[str, str] | None = None) -> None:
        created = self.admin.create_topics([NewTopic(topic, partitions, config=config or {})])
        created[topic].result(SECONDS)

    def producer(self, **options: Any) -> Producer:
        return Producer({"bootstrap.servers": self.address, "enable.idempotence": True, "linger.ms": 5, **options})

    @contextmanager
    def consumer(self, topic: str, offsets: dict[int, int], **options: Any) -> Iterator[Consumer]:
        consumer = Consumer(
            {
                "bootstrap.servers": self.address,
                "group.id": "none",
                "enable.auto.commit": False,
                "auto.offset.reset": "earliest",
                **options,
            }
        )
        consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in offsets.items()])
        try:
            yield consumer
        finally:
            consumer.close()

    def consume(self, topic: str, partitions: int, count: int) -> list[Message]:
        """The first `count` messages of a topic; of each partition in order."""
        with self.consumer(topic, dict.fromkeys(range(partitions), OFFSET_BEGINNING)) as consumer:
            return take(consumer, count)


def take(consumer: Consumer, count: int) -> list[Message]:
    found: list[Message] = []
    deadline = time.monotonic() + SECONDS
    while len(found) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} messages"
        for message in consumer.consume(count - len(found), 0.2):
            assert message.error() is None, message.error()
            found.append(message)
    return found


def values(messages: list[Message]) -> list[str]:
    return [(message.value() or b"").decode() for message in messages]


def refusal(work: Callable[[], object]) -> int:
    with pytest.raises(KafkaException) as raised:
        work()
    return int(raised.value.args[0].code())


class Delivered:
    """What a producer was told of its messages: (partition, offset) by value."""

    def __init__(self) -> None:
        self.at: dict[str, tuple[int, int]] = {}
        self.errors: list[KafkaError] = []

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            self.errors.append(error)
        else:
            self.at[values([message])[0]] = (message.partition() or 0, message.offset() or 0)


def in_time(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, SECONDS))


@pytest.fixture(scope="module")
def brokers(
    postgres_server: PostgresServer,
    template_database: str,
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Brokers]:
    """The same for all these tests: each has topics of its own, and the one that kills brokers starts them again."""
    with psycopg.connect(postgres_server.url(), autocommit=True) as admin, Redis.from_url(redis_server.url) as redis:
        redis.flushall()
        admin.execute(f"create database kafka template {template_database}")
        url = postgres_server.url("kafka")
        place = Place(database_url=url, broker_url=redis_server.url, directory=tmp_path_factory.mktemp("kafka"))
        with app_for(url, redis_server.url) as app, psycopg.connect(url, autocommit=True) as conn:
            programs = Programs(place, app)
            try:
                yield Brokers(programs, app, conn)
                programs.require_discreet()
            finally:
                programs.close()
        admin.execute("drop database kafka with (force)")


def test_a_round_trip_with_both_clients(brokers: Brokers) -> None:
    """What either of them has sent, both read: with the offsets that were acknowledged, and in the order of sending."""
    brokers.create("mail", 3)
    delivered = Delivered()
    producers = [brokers.producer(), brokers.producer(**{"compression.type": "lz4"})]
    for number in range(300):
        producer, key = producers[number % 2], f"key{number % 10}"
        producer.produce("mail", key=key, value=f"{key} {number:03}", on_delivery=delivered)
    for producer in producers:
        assert producer.flush(SECONDS) == 0

    async def send() -> None:
        async with AIOKafkaProducer(bootstrap_servers=brokers.address, enable_idempotence=True) as producer:
            sent = [await producer.send("mail", f"aio {n:03}".encode(), partition=n % 3) for n in range(99)]
            for number, future in enumerate(sent):
                metadata = await future
                delivered.at[f"aio {number:03}"] = (metadata.partition, metadata.offset)

    in_time(send())
    assert delivered.errors == []

    async def receive() -> dict[str, tuple[int, int]]:
        async with AIOKafkaConsumer(bootstrap_servers=brokers.address, auto_offset_reset="earliest") as consumer:
            consumer.assign([AioPartition("mail", partition) for partition in range(3)])
            found: dict[str, tuple[int, int]] = {}
            while len(found) < 399:
                for partition, records in (await consumer.getmany(timeout_ms=1000)).items():
                    found |= {record.value.decode(): (partition.partition, record.offset) for record in records}
            return found

    messages = brokers.consume("mail", 3, 399)
    assert {values([m])[0]: (m.partition(), m.offset()) for m in messages} == delivered.at
    assert in_time(receive()) == delivered.at
    for key in {value.split()[0] for value in values(messages)} - {"aio"}:
        of_key = [value for value in values(messages) if value.startswith(key + " ")]
        assert of_key == sorted(of_key), "the order of a key"


def test_an_object_holds_batches_of_several_clients(brokers: Brokers) -> None:
    brokers.create("together")
    producers = [brokers.producer(), brokers.producer()]
    shared = "select from tidemark.producer_batches where partition_id = %s"
    shared += " group by id >> 16 having count(distinct producer_id) = 2"

    def an_object_is_shared() -> bool:
        for producer in producers:
            producer.produce("together", value="one of two")
            producer.poll(0)
        assert [producer.flush(SECONDS) for producer in producers] == [0, 0]
        return brokers.conn.execute(shared, partition_ids(brokers.conn, "together")).fetchone() is not None

    wait_until(an_object_is_shared)


def test_administration(brokers: Brokers) -> None:
    admin = brokers.admin
    brokers.create("first", 2)
    with brokers.consumer("first", {}) as consumer:
        assert "first" in admin.list_topics(timeout=SECONDS).topics
        described = consumer.list_topics("first", SECONDS).topics["first"]
        assert sorted(described.partitions) == [0, 1]
        missing = consumer.list_topics("nosuch", SECONDS).topics["nosuch"]
        assert missing.error is not None
        assert missing.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART
    assert refusal(lambda: brokers.create("first")) == KafkaError.TOPIC_ALREADY_EXISTS
    assert refusal(lambda: brokers.create("not legal")) == KafkaError.TOPIC_EXCEPTION
    for config in ({"cleanup.policy": "compact"}, {"retention.ms": "soon"}):
        refused = admin.create_topics([NewTopic("other", 1, config=config)])["other"]
        assert refusal(partial(refused.result, SECONDS)) == KafkaError.INVALID_CONFIG

    admin.create_partitions([NewPartitions("first", 4)])["first"].result(SECONDS)
    assert len(partition_ids(brokers.conn, "first")) == 4
    fewer = admin.create_partitions([NewPartitions("first", 3)])["first"]
    assert refusal(lambda: fewer.result(SECONDS)) == KafkaError.INVALID_PARTITIONS

    delivered = Delivered()
    producer = brokers.producer(**{"topic.metadata.propagation.max.ms": 0})
    producer.produce("first", value="one", partition=3, on_delivery=delivered)
    producer.produce("nosuch", value="two", on_delivery=delivered)
    assert producer.flush(SECONDS) == 0
    assert delivered.at == {"one": (3, 0)}
    assert [error.code() for error in delivered.errors] == [KafkaError.UNKNOWN_TOPIC_OR_PART]

    admin.delete_topics(["first"])["first"].result(SECONDS)
    with pytest.raises(UnknownTopicError):
        partition_ids(brokers.conn, "first")
    gone = admin.delete_topics(["first"])["first"]
    assert refusal(lambda: gone.result(SECONDS)) == KafkaError.UNKNOWN_TOPIC_OR_PART
    # Its name is free, and the broker does not mistake the new topic for the old one.
    brokers.create("first")
    again = brokers.producer()
    again.produce("first", value="three", on_delivery=delivered)
    assert again.flush(SECONDS) == 0
    assert delivered.at["three"] == (0, 0)
    assert values(brokers.consume("first", 1, 1)) == ["three"]


def test_offsets_by_time(brokers: Brokers) -> None:
    brokers.create("times")
    producer = brokers.producer()
    for second in range(1, 5):
        producer.produce("times", value=str(second), timestamp=second * 1000)
        assert producer.flush(SECONDS) == 0

    with brokers.consumer("times", {}) as consumer:

        def offset_at(milliseconds: int) -> int:
            (found,) = consumer.offsets_for_times([TopicPartition("times", 0, milliseconds)], SECONDS)
            return int(found.offset)

        assert [offset_at(t) for t in (0, 1000, 1001, 4000)] == [0, 0, 1, 3]
        assert offset_at(4001) == -1, "librdkafka's end"
        assert consumer.get_watermark_offsets(TopicPartition("times", 0), SECONDS) == (0, 4)

    async def ask() -> list[int | None]:
        async with AIOKafkaConsumer(bootstrap_servers=brokers.address) as consumer:
            partition = AioPartition("times", 0)
            found = [(await consumer.offsets_for_times({partition: t}))[partition] for t in (2500, 4001)]
            return [None if one is None else one.offset for one in found]

    assert in_time(ask()) == [2, None]


def test_delete_records_and_retention_under_a_reader(brokers: Brokers) -> None:
    brokers.create("short", config={"retention.bytes": "0"})
    producer = brokers.producer(**{"linger.ms": 0})

    def produce(first: int, end: int) -> None:
        for number in range(first, end):
            producer.produce("short", value=str(number))
            assert producer.flush(SECONDS) == 0

    produce(0, 6)
    with brokers.consumer("short", {0: 0}, **{"fetch.wait.max.ms": 50}) as reader:
        assert values(take(reader, 6)) == list("012345")
        partition = TopicPartition("short", 0, 3)
        assert brokers.admin.delete_records([partition])[partition].result(SECONDS).low_watermark == 3
        # Where the reader goes back to is gone: it goes on from the earliest. One that was there before the records
        # were deleted may have fetched them.
        reader.seek(TopicPartition("short", 0, 2))
        assert values(take(reader, 3)) == list("345")
        retain(brokers.app)
        assert reader.get_watermark_offsets(partition, SECONDS) == (6, 6)
        produce(6, 8)
        assert values(take(reader, 2)) == list("67")
        retain(brokers.app)
        reader.seek(TopicPartition("short", 0, 4))
        produce(8, 9)
        assert values(take(reader, 1)) == ["8"]
        beyond = TopicPartition("short", 0, 100)
        deleted = brokers.admin.delete_records([beyond])[beyond]
        assert deleted.result(SECONDS).low_watermark == 9, "as far as the end"


def test_a_fetch_waits_and_wakes(brokers: Brokers) -> None:
    brokers.create("quiet")
    with brokers.consumer("quiet", {0: 0}, **{"fetch.wait.max.ms": 15_000, "fetch.min.bytes": 1}) as reader:
        assert reader.poll(1.0) is None
        # By now the broker holds its fetch.
        producer = brokers.producer()
        producer.produce("quiet", value="at last")
        began = time.monotonic()
        assert values(take(reader, 1)) == ["at last"]
        assert time.monotonic() - began < 5


class Wire:
    """Kafka's protocol by hand, for what no client of good faith sends."""

    def __init__(self, brokers: Brokers) -> None:
        host, _, port = brokers.address.split(",")[0].partition(":")
        self.socket = socket.create_connection((host, int(port)), SECONDS)

    def ask(self, request_type: type[Any], response_type: type[Any], **fields: Any) -> Any:
        key, version = request_type.__api_key__, request_type.__version__
        frame = BytesIO()
        header = {"request_api_key": key, "request_api_version": version, "correlation_id": 7, "client_id": None}
        entity_writer(request_type.__header_schema__)(frame, request_type.__header_schema__(**header))
        entity_writer(request_type)(frame, request_type(**fields))
        self.socket.sendall(struct.pack(">i", frame.tell()) + frame.getvalue())
        with self.socket.makefile("rb") as answers:
            (size,) = struct.unpack(">i", answers.read(4))
            answer = answers.read(size)
        _, begin = entity_reader(response_type.__header_schema__)(answer, 0)
        return entity_reader(response_type)(answer, begin)[0]

    def produce(self, topic: str, *batches: bytes) -> list[tuple[ErrorCode, int]]:
        """The batches, one for each partition, in one request: the error and the base offset of each."""
        partitions = tuple(PartitionProduceData(index=i32(n), records=Records(b)) for n, b in enumerate(batches))
        topics = (TopicProduceData(name=TopicName(topic), partition_data=partitions),)
        timeout = i32Timedelta.parse(timedelta(seconds=SECONDS))
        answer = self.ask(ProduceRequest, ProduceResponse, acks=i16(-1), timeout=timeout, topic_data=topics)
        return [(p.error_code, p.base_offset) for p in answer.responses[0].partition_responses]


@pytest.fixture
def wire(brokers: Brokers) -> Iterator[Wire]:
    wire = Wire(brokers)
    yield wire
    wire.socket.close()


def batch(producer_id: int, epoch: int, sequence: int, *, records: int = 1) -> bytes:
    builder = DefaultRecordBatchBuilder(2, 0, 0, producer_id, epoch, sequence, 10_000)
    for n in range(records):
        builder.append(n, 1_700_000_000_000, None, b"value", [])
    return bytes(builder.build())


def test_each_batch_has_its_own_verdict(brokers: Brokers, wire: Wire) -> None:
    brokers.create("verdicts", 2)
    new = {"transactional_id": None, "transaction_timeout": i32Timedelta.parse(timedelta(0))}
    given = wire.ask(InitProducerIdRequest, InitProducerIdResponse, **new)
    own, epoch = given.producer_id, given.producer_epoch
    sound = batch(own, epoch, 0, records=3)
    broken = sound[:-1] + b"?"
    fine, lost, refused = (
        (ErrorCode.none, 0),
        ErrorCode.unknown_topic_or_partition,
        ErrorCode.out_of_order_sequence_number,
    )
    assert wire.produce("verdicts", sound, broken) == [fine, (ErrorCode.corrupt_message, -1)]
    assert wire.produce("verdicts", batch(own, epoch, 3), sound, sound) == [(ErrorCode.none, 3), fine, (lost, -1)]
    # Once more: nothing is appended, and the answer is that to the first one.
    assert wire.produce("verdicts", sound, sound) == [fine, fine]
    assert wire.produce("verdicts", batch(own, epoch, 9), batch(own, epoch, 3)) == [(refused, -1), (ErrorCode.none, 3)]
    for unsound in (b"", sound[:60], sound + sound, b"\0" * 61):
        assert wire.produce("verdicts", unsound) == [(ErrorCode.corrupt_message, -1)]
    assert wire.produce("nosuch", sound) == [(lost, -1)]

    known = {**new, "producer_id": own, "producer_epoch": epoch}
    bumped = wire.ask(InitProducerIdRequest, InitProducerIdResponse, **known)
    assert (bumped.producer_id, bumped.producer_epoch) == (own, epoch + 1)
    assert wire.produce("verdicts", batch(own, epoch, 4)) == [(ErrorCode.invalid_producer_epoch, -1)]
    assert wire.produce("verdicts", batch(own, epoch + 1, 0)) == [(ErrorCode.none, 4)]


def test_a_newer_client_learns_which_versions_there_are(wire: Wire) -> None:
    told = wire.ask(
        api_versions_v4.ApiVersionsRequest,
        api_versions_v0.ApiVersionsResponse,
        client_software_name="of-tomorrow",
        client_software_version="9",
    )
    assert told.error_code == ErrorCode.unsupported_version
    assert {key.api_key: (key.min_version, key.max_version) for key in told.api_keys}[18] == (0, 3)


def test_every_message_once_and_in_order_while_brokers_are_killed(brokers: Brokers) -> None:
    """An idempotent producer; both brokers are killed in turn, again and again, and come back."""
    # A broker that dies between commit and wake-up leaves the batch to the fan-out.
    brokers.programs.beat()
    brokers.create("ledger", 4)
    delivered = Delivered()
    stop = threading.Event()
    sent: dict[str, int] = defaultdict(int)

    def produce() -> None:
        options = {"reconnect.backoff.max.ms": 100, "topic.metadata.refresh.interval.ms": 500, "retry.backoff.ms": 50}
        producer = brokers.producer(**options, **{"message.timeout.ms": 60_000, "socket.timeout.ms": 5_000})
        while not stop.is_set():
            for key in "abcdefgh":
                producer.produce("ledger", key=key, value=f"{key} {sent[key]}", on_delivery=delivered)
                sent[key] += 1
            producer.poll(0.02)
        assert producer.flush(SECONDS) == 0

    def wait_for_more() -> None:
        so_far = len(delivered.at)

        def more_is_delivered() -> bool:
            return len(delivered.at) > so_far + 100

        wait_until(more_is_delivered)

    thread = threading.Thread(target=produce)
    thread.start()
    try:
        for turn in range(4):
            process = brokers.processes[turn % 2]
            wait_for_more()
            process.kill()
            wait_for_more()
            process.restart()
            brokers.wait_for(process, starts=turn // 2 + 2)
    finally:
        stop.set()
        thread.join(SECONDS)
    assert delivered.errors == []
    total = sum(sent.values())
    assert len(delivered.at) == total
    messages = brokers.consume("ledger", 4, total)
    by_key: dict[str, list[str]] = defaultdict(list)
    for message in messages:
        by_key[(message.key() or b"").decode()].append(values([message])[0])
    assert by_key == {key: [f"{key} {n}" for n in range(count)] for key, count in sent.items()}
    assert {values([m])[0]: (m.partition(), m.offset()) for m in messages} == delivered.at
    with brokers.consumer("ledger", {}) as consumer:
        ends = [consumer.get_watermark_offsets(TopicPartition("ledger", p), SECONDS)[1] for p in range(4)]
    assert sum(ends) == total, "nothing behind them either"
