"""`python -m tests.kafka --node 1 --store DIR`: a broker, on the Postgres and Redis that Tidemark's settings name."""

import argparse
import asyncio
import logging
import signal
import socket
import sys
from functools import partial

from kio.schema.types import BrokerId
from kio.static.primitive import i32

from config.errors import TidemarkError
from tasks.app import app
from tasks.dispatch import wake
from tests.kafka.backends import Moved, Objects, make_pool
from tests.kafka.fetch import Fetching
from tests.kafka.metadata import Administration, Cluster, Node, Topics
from tests.kafka.produce import Producing
from tests.kafka.server import Api, Server

_HOST = "127.0.0.1"


def node(text: str) -> Node:
    """A broker by its id and port: `1=9092`."""
    node_id, port = map(int, text.split("="))
    return Node(node_id=BrokerId(node_id), host=_HOST, port=i32(port))


async def run(options: argparse.Namespace) -> None:
    """Serve until SIGTERM."""
    if app.redis_url is None:
        sys.exit("A broker needs Redis, to hear from workers: set TIDEMARK_REDIS_URL.")
    listening = socket.create_server((_HOST, options.port))
    own = node(f"{options.node}={listening.getsockname()[1]}")
    objects, moved = Objects(options.store), Moved(app.redis_url)
    async with make_pool(app.database_url) as pool, asyncio.TaskGroup() as tasks:
        topics = Topics(pool)
        producing = Producing(pool, topics, objects, moved, partial(wake, app), options.linger_ms / 1000)
        fetching = Fetching(pool, topics, objects, moved)
        administration = Administration(pool, topics, Cluster(own, options.peers))
        server = Server(
            {
                # Kafka's number of the API, and the versions that librdkafka and aiokafka have in common.
                Api(0, 3, 7): producing.produce,
                Api(1, 4, 11): fetching.fetch,
                Api(2, 1, 3): fetching.list_offsets,
                Api(3, 1, 5): administration.metadata,
                Api(19, 2, 4): administration.create_topics,
                Api(20, 1, 3): administration.delete_topics,
                Api(21, 0, 1): administration.delete_records,
                Api(22, 0, 4): producing.init_producer_id,
                Api(37, 0, 1): administration.create_partitions,
            }
        )
        for work in (moved.run(), producing.commit(), producing.acknowledge()):
            tasks.create_task(work)
        await asyncio.start_server(lambda r, w: tasks.create_task(server.serve(r, w)), sock=listening, limit=2**20)
        print(f"node {own.node_id} listens on {own.host}:{own.port}", flush=True)  # noqa: T201
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()
        # It ends the group, and cancels the tasks that are in it.
        sys.exit()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.kafka", description=__doc__)
    parser.add_argument("--node", type=int, required=True, help="id of this broker")
    parser.add_argument("--port", type=int, default=0, help="0: any that is free; it is printed")
    parser.add_argument("--peers", type=node, nargs="*", default=[], metavar="NODE=PORT", help="the other brokers")
    parser.add_argument("--store", required=True, help="where objects are: a directory, or any URL that fsspec knows")
    parser.add_argument("--linger-ms", type=float, default=50, help="so long batches wait for others")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(run(parser.parse_args()))
    except (TidemarkError, OSError) as error:
        sys.exit(str(error))
