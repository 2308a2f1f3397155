"""A worker, its results and its leases over every kind of Redis URL, against real servers."""

import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis, RedisError

from config.embedded import host
from config.redis import RedisAddress
from tests.acceptance.conftest import Log, Place, Programs, make_app
from tests.acceptance.producers import commit_one
from tests.servers import RedisServer
from tests.support import wait_until

# Made for these tests, for 127.0.0.1 and for a hundred years; it guards nothing.
TLS = Path(__file__).parent / "tls"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Servers:
    """Redis servers with configurations of a test's own; they end with it."""

    def __init__(self, directory: Path, binary: Path) -> None:
        self._directory = directory
        self._binary = binary
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *lines: str, sentinel: bool = False) -> None:
        directory = self._directory / name
        directory.mkdir()
        conf = directory / "redis.conf"
        conf.write_text("\n".join([f"dir {directory}", *lines, ""]))
        with (directory / "log").open("wb") as log:
            self._processes[name] = subprocess.Popen(
                [self._binary, conf, *(["--sentinel"] if sentinel else [])], stdout=log, stderr=log
            )

    def kill(self, name: str) -> None:
        process = self._processes.pop(name)
        process.kill()
        process.wait()

    def close(self) -> None:
        for name in list(self._processes):
            self.kill(name)


@pytest.fixture
def servers(tmp_path: Path, redis_binary: Path | None) -> Iterator[Servers]:
    made = Servers(tmp_path, redis_binary or host.redis_binary())
    yield made
    made.close()


class At:
    """Programs on the Redis of one URL."""

    def __init__(self, url: str, place: Place) -> None:
        settings = {**place.settings, "TIDEMARK_LEASE_SECONDS": "4", "TIDEMARK_DATA_DIR": str(place.directory)}
        here = Place(database_url=place.database_url, broker_url=url, directory=place.directory, settings=settings)
        self.app = make_app(here)
        self.programs = Programs(here, self.app)
        self._redis = RedisAddress.parse(url).client(seconds=1)

        def it_answers() -> bool:
            with suppress(RedisError):
                return bool(self._redis.ping())
            return False

        wait_until(it_answers)

    def materialize(self, log: Log, key: str) -> None:
        """A commit, a job for it, and its result: broker, results and the leased shard queues are all there."""
        commit_one(log.conn, log.ledger, key, log.partitions)
        (shards, _) = (
            self.app.send_task("tasks.materialize_topic", ("orders",), ignore_result=False).get(timeout=20),
            0,
        )
        assert len(shards) == 4
        log.wait_until_drained()

    def close(self) -> None:
        self.programs.close()
        self._redis.close()
        self.app.backend.result_consumer.stop()
        self.app.backend.client.connection_pool.disconnect()
        assert self.app.redis is not None
        self.app.redis.close()
        self.app.close()


def test_a_unix_socket(servers: Servers, place: Place, log: Log, tmp_path: Path) -> None:
    servers.start("unix", "port 0", "unixsocket redis.sock")
    at = At(f"redis+socket://{tmp_path}/unix/redis.sock?virtual_host=2", place)
    try:
        at.programs.worker()
        at.materialize(log, "bucket/1")
        with Redis(unix_socket_path=f"{tmp_path}/unix/redis.sock", db=2) as redis:
            assert redis.exists("tidemark:programs"), "the database that the URL names"
    finally:
        at.close()
    log.check()


class TlsEnd:
    """TLS in front of a Redis: the wheel's server is built without."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(TLS / "server.pem")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                raw, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(raw,), daemon=True).start()

    def _serve(self, raw: socket.socket) -> None:
        with (
            suppress(OSError),
            self._context.wrap_socket(raw, server_side=True) as client,
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            there = threading.Thread(target=self._copy, args=(client, server), daemon=True)
            there.start()
            self._copy(server, client)
            there.join(5)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


def test_tls(redis_server: RedisServer, redis_url: str, place: Place, log: Log) -> None:
    """The certificate is checked: without its issuer there is no connection."""
    plain = RedisAddress.parse(redis_url)
    end = TlsEnd(plain.hosts[0][1])
    url = f"rediss://:{plain.password}@127.0.0.1:{end.port}/{plain.db}"
    with pytest.raises(RedisError, match="CERTIFICATE_VERIFY_FAILED"):
        RedisAddress.parse(url).client(seconds=2).ping()
    at = At(f"{url}?ssl_ca_certs={TLS / 'ca.pem'}", place)
    try:
        at.programs.worker()
        at.materialize(log, "bucket/1")
    finally:
        at.close()
        end.close()
    log.check()


@pytest.mark.parametrize(("host", "found"), [("127.0.0.1", "unexpectedly closed"), ("127.1", "Hostname mismatch")])
def test_the_name_in_a_rabbitmqs_certificate(
    host: str, found: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked before a word is said. Nobody listens behind it, which is found next.

    127.1 is the same place by another name; for `localhost` Kombu would put 127.0.0.1.
    """
    monkeypatch.setenv("SSL_CERT_FILE", str(TLS / "ca.pem"))
    end = TlsEnd(free_port())
    broker_url = f"amqps://{host}:{end.port}//"
    app = make_app(Place(database_url=place.database_url, broker_url=broker_url, directory=place.directory))
    with app.connection_for_write(connect_timeout=10) as connection, pytest.raises(Exception, match=found):
        connection.connect()
    end.close()
    app.close()


def test_a_sentinel_and_a_fail_over(servers: Servers, place: Place, log: Log) -> None:
    """The master dies; the worker goes on with the replica that the sentinel promotes."""
    first, second, watcher = free_port(), free_port(), free_port()
    common = ("bind 127.0.0.1", "requirepass pw", "masterauth pw", "repl-diskless-sync no")
    servers.start("first", f"port {first}", *common)
    servers.start("second", f"port {second}", *common, f"replicaof 127.0.0.1 {first}")
    servers.start(
        "sentinel",
        "bind 127.0.0.1",
        f"port {watcher}",
        f"sentinel monitor tide 127.0.0.1 {first} 1",
        "sentinel auth-pass tide pw",
        "sentinel down-after-milliseconds tide 1000",
        "sentinel failover-timeout tide 3000",
        sentinel=True,
    )
    with Redis(port=second, password="pw", decode_responses=True) as replica:

        def the_replica_follows() -> bool:
            with suppress(RedisError):
                return bool(replica.info("replication")["master_link_status"] == "up")
            return False

        wait_until(the_replica_follows)
        with Redis(port=watcher) as sentinel:

            def the_sentinel_knows_the_replica() -> bool:
                with suppress(RedisError):
                    return bool(sentinel.sentinel_slaves("tide"))
                return False

            wait_until(the_sentinel_knows_the_replica, timeout=20)
        at = At(f"sentinel://:pw@127.0.0.1:{watcher}/0?master_name=tide", place)
        try:
            worker = at.programs.worker()
            at.materialize(log, "bucket/1")
            servers.kill("first")

            def the_replica_is_master() -> bool:
                return bool(replica.info("replication")["role"] == "master")

            wait_until(the_replica_is_master, timeout=60)

            def the_worker_is_back() -> bool:
                return bool(replica.info("clients")["blocked_clients"] > 0)

            wait_until(the_worker_is_back, timeout=60)
            at.materialize(log, "bucket/2")
            assert worker.process.running
        finally:
            at.close()
    log.check()
