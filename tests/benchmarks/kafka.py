"""Kafka's clients through the example broker: `python -m tests.benchmarks.kafka [--seconds N]`.

One broker (tests/kafka), one worker and beat, on Postgres and Redis of their own, objects in local files. One producer
of librdkafka's: idempotent, acks=all, linger 5 ms, 16 partitions. First at a steady rate, for what an acknowledgement
takes; then as fast as it can, with no more than 100,000 messages on their way. For two times that the broker gathers.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from confluent_kafka import KafkaError, Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from db.migrate import upgrade
from tests.demo.programs import Programs, free_port
from tests.servers import PostgresServer, RedisServer
from tests.support import wait_until

PARTITIONS = 16
SIZES = (100, 1_000)
BROKER_LINGERS_MS = (5, 50)
STEADY_RATE = 50
_LEFT_SECONDS = 60


class Acknowledged:
    """Seconds from produce() to the acknowledgement, of each message."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, error: KafkaError | None, message: Message) -> None:
        if error is not None:
            raise RuntimeError(f"not delivered: {error}")
        self.seconds.append(message.latency() or 0.0)


def produce(address: str, topic: str, size: int, seconds: float, rate: float | None) -> tuple[list[float], float]:
    """Latencies, and the seconds until the last acknowledgement."""
    options = {"enable.idempotence": True, "linger.ms": 5, "queue.buffering.max.messages": 100_000}
    producer = Producer({"bootstrap.servers": address, **options})
    done = Acknowledged()
    value = bytes(size)
    # Connections, the producer's id and the topic's ids are there when it begins.
    for partition in range(PARTITIONS):
        producer.produce(topic, value, partition=partition)
    if producer.flush(_LEFT_SECONDS):
        raise TimeoutError("the broker acknowledges nothing")
    began = time.perf_counter()
    sent = 0
    while (now := time.perf_counter() - began) < seconds:
        if rate is not None and sent > now * rate:
            producer.poll(0.001)
            continue
        try:
            producer.produce(topic, value, partition=sent % PARTITIONS, on_delivery=done)
            sent += 1
        except BufferError:
            producer.poll(0.01)
        producer.poll(0)
    if producer.flush(_LEFT_SECONDS) or len(done.seconds) != sent:
        raise TimeoutError(f"{len(done.seconds)} of {sent} messages are acknowledged")
    return done.seconds, time.perf_counter() - began


@contextmanager
def broker(programs: Programs, directory: Path, linger_ms: int) -> Iterator[str]:
    """Its address."""
    port = free_port()
    options = ["--node", "1", "--port", str(port), "--store", str(directory / "objects"), "--linger-ms", str(linger_ms)]
    process = programs.process(f"broker-{linger_ms}", [sys.executable, "-m", "tests.kafka", *options])

    def the_broker_listens() -> bool:
        process.require_well()
        return "listens on" in process.output()

    wait_until(the_broker_listens, timeout=30)
    yield f"127.0.0.1:{port}"
    process.end()


def report(seconds: float, stack: ExitStack) -> None:
    directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tidemark-kafka-")))
    directory.chmod(0o711)
    postgres = stack.enter_context(PostgresServer(directory / "postgres").start())
    redis = stack.enter_context(RedisServer(directory / "redis").start())
    upgrade(postgres.url())
    env = {
        "TIDEMARK_DATABASE_URL": postgres.url(),
        "TIDEMARK_BROKER_URL": redis.url,
        "TIDEMARK_DATA_DIR": str(directory),
        # A task is that of one shard, and one worker does one after the other.
        "TIDEMARK_SHARDS": "2",
    }
    programs = Programs(directory, env)
    stack.callback(programs.stop)
    for name in ("worker", "beat"):
        programs.celery(name, name)
    line = "{:>12} {:>8}  {:<10} {:>12} {:>8} {:>9} {:>9}\n"
    sys.stdout.write(line.format("gathers, ms", "bytes", "load", "messages/s", "MB/s", "p50, ms", "p99, ms"))
    for linger_ms in BROKER_LINGERS_MS:
        with broker(programs, directory, linger_ms) as address:
            admin = AdminClient({"bootstrap.servers": address})
            for size in SIZES:
                topic = f"bench-{linger_ms}-{size}"
                admin.create_topics([NewTopic(topic, PARTITIONS)])[topic].result(_LEFT_SECONDS)
                for load, rate in ((f"{STEADY_RATE}/s", STEADY_RATE), ("all it can", None)):
                    latencies, took = produce(address, topic, size, seconds, rate)
                    *_, p99 = cuts = statistics.quantiles(latencies, n=100, method="inclusive")
                    speed = len(latencies) / took
                    figures = f"{speed:,.0f}", f"{speed * size / 1e6:.2f}", f"{cuts[49] * 1e3:.0f}", f"{p99 * 1e3:.0f}"
                    sys.stdout.write(line.format(linger_ms, size, load, *figures))
                    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement (default: %(default)s)")
    with ExitStack() as stack:
        report(parser.parse_args().seconds, stack)


if __name__ == "__main__":
    main()
