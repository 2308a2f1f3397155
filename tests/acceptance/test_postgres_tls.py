"""Postgres over TLS: the server's certificate, its name and the client's own are checked, and a password asked for.

The wheel's Postgres is built without TLS, so this needs another one, which `make test-tls` names.
"""

import datetime as dt
import ipaddress
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from config.embedded.host import write_private
from db.migrate import upgrade
from tests.acceptance.conftest import Log, Place, Programs
from tests.acceptance.producers import commit_one
from tests.demo.programs import celery_argv, free_port
from tests.servers import PostgresServer

pytestmark = [pytest.mark.tls, pytest.mark.timeout(180)]

PASSWORD = "tL5wQ8zR3nVx7Kc2"
TODAY = dt.datetime.now(dt.UTC)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """A certificate and its key, as PEM."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def public(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    @property
    def private(self) -> str:
        form = serialization.PrivateFormat.PKCS8
        return self.key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def certify(name: str, *, by: Identity | None = None, days: int = 1) -> Identity:
    """Certify `name`, and 127.0.0.1; negative `days` for a certificate that has expired. Without `by`, an authority."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if by is None else by.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(TODAY - dt.timedelta(days=9))
        .not_valid_after(TODAY + dt.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
    )
    return Identity(certificate=builder.sign(key if by is None else by.key, hashes.SHA256()), key=key)


class TlsPostgres(PostgresServer):
    """On a port of 127.0.0.1, for TLS and passwords only; by its socket for us. `certified` needs a certificate."""

    def __init__(self, directory: Path, *, bin_dir: Path | None, authority: Identity, server: Identity) -> None:
        super().__init__(directory, bin_dir=bin_dir, settings={"fsync": "off", "password_encryption": "scram-sha-256"})
        self.port = free_port()
        self._files = {"ca.pem": authority.public, "server.pem": server.public, "server.key": server.private}

    def _prepare(self) -> list[str | Path]:
        argv = super()._prepare()
        rules = (
            "local all tidemark trust",
            "hostssl all tidemark 127.0.0.1/32 scram-sha-256",
            "hostssl all certified 127.0.0.1/32 scram-sha-256 clientcert=verify-full",
        )
        for name, text in {**self._files, "pg_hba.conf": "\n".join([*rules, ""])}.items():
            write_private(self._data / name, text, owner=self._account)
        tls = ["--ssl=on", "--ssl_ca_file=ca.pem", "--ssl_cert_file=server.pem", "--ssl_key_file=server.key"]
        return [*argv, "--listen_addresses=127.0.0.1", f"--port={self.port}", *tls]

    def admin(self) -> psycopg.Connection[Any]:
        return psycopg.connect(f"{self.url()}&port={self.port}", autocommit=True)

    def tls_url(
        self, *, user: str = "tidemark", host: str = "127.0.0.1", password: str = PASSWORD, **more: object
    ) -> str:
        options = "&".join(f"{name}={value}" for name, value in {"sslmode": "verify-full", **more}.items())
        return f"postgresql://{user}:{password}@{host}:{self.port}/tidemark?{options}"


@pytest.fixture(scope="module")
def authority() -> Identity:
    return certify("authority")


@pytest.fixture(scope="module")
def files(authority: Identity, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a client has: the authority's certificate, another one's, and its own with its key."""
    directory = tmp_path_factory.mktemp("tls")
    client = certify("certified", by=authority)
    found = {}
    for name, text in {
        "ca": authority.public,
        "stranger": certify("stranger").public,
        "certificate": client.public,
        "key": client.private,
    }.items():
        found[name] = directory / f"{name}.pem"
        write_private(found[name], text)
    return found


@pytest.fixture(scope="module")
def postgres(server_directory: Path, postgres_bin: Path | None, authority: Identity) -> Iterator[TlsPostgres]:
    if postgres_bin is None:
        pytest.skip("the wheel's Postgres has no TLS: name another one's bin directory by TIDEMARK_TEST_POSTGRES_BIN")
    server = TlsPostgres(
        server_directory / "tls", bin_dir=postgres_bin, authority=authority, server=certify("server", by=authority)
    )
    with server.start():
        with server.admin() as conn:
            conn.execute(f"alter role tidemark password '{PASSWORD}'")
            conn.execute(f"create role certified login superuser password '{PASSWORD}'")
        yield server


@pytest.fixture
def place(postgres: TlsPostgres, redis_url: str, files: dict[str, Path], tmp_path: Path) -> Place:
    """A certificate of its own, a password, and a server that proves who it is."""
    url = postgres.tls_url(user="certified", sslrootcert=files["ca"], sslcert=files["certificate"], sslkey=files["key"])
    upgrade(url, timeout=60)
    return Place(database_url=url, broker_url=redis_url, directory=tmp_path)


def test_all_programs(start: Programs, log: Log, postgres: TlsPostgres) -> None:
    """Every session is encrypted."""
    exporter = start.celery("exporter", "exporter", "--port", "0")
    start.worker()
    start.beat()
    commit_one(log.conn, log.ledger, "bucket/1", log.partitions)
    log.wait_until_drained()
    log.check()
    shown = start.run("status", "--interval", "0")
    assert shown.returncode == 0, shown.stderr
    assert exporter.running
    with postgres.admin() as conn:
        plain = conn.execute(
            "select count(*), count(*) filter (where not s.ssl) from pg_stat_ssl s join pg_stat_activity a using (pid) "
            "where a.usename = 'certified'"
        ).fetchone()
    assert plain is not None
    assert plain[0] > 1
    assert plain[1] == 0


def test_what_is_refused(
    start: Programs, postgres: TlsPostgres, files: dict[str, Path], authority: Identity, server_directory: Path
) -> None:
    """One line each: it names the server and the variable, and tells no password."""
    expired = TlsPostgres(
        server_directory / "expired",
        bin_dir=postgres._binary.parent,
        authority=authority,
        server=certify("server", by=authority, days=-1),
    )
    with expired.start():
        other_name = postgres.tls_url(host="localhost", hostaddr="127.0.0.1", sslrootcert=files["ca"])
        for url, words in (
            (postgres.tls_url(sslrootcert=files["stranger"]), "certificate verify failed"),
            (expired.tls_url(sslrootcert=files["ca"]), "certificate verify failed"),
            (other_name, "does not match host name"),
            (postgres.tls_url(password="wr0ng-passw0rd", sslrootcert=files["ca"]), "password authentication failed"),
            (postgres.tls_url(user="certified", sslrootcert=files["ca"]), "client certificate"),
            (postgres.tls_url(sslmode="disable"), "no encryption"),
        ):
            refused = subprocess.run(
                celery_argv("status", "--interval", "0", "--timeout", "60"),
                env={**os.environ, **start.env, "TIDEMARK_DATABASE_URL": url},
                capture_output=True,
                check=False,
                text=True,
            )
            assert refused.returncode == 1, refused
            (line,) = refused.stderr.splitlines()
            assert words in line, line
            assert "TIDEMARK_DATABASE_URL" in line
            assert "127.0.0.1" in line or "localhost" in line
            assert PASSWORD not in line
            assert "wr0ng" not in line
