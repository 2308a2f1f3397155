"""One Redis address, and what each of its clients takes: Kombu, Celery's results, RedBeat and our own.

Each of them understands other URLs and other options; this is the one place that knows which.

    redis://[user:password@]host[:port][/db]
    rediss://…                     with TLS; ?ssl_ca_certs=FILE, ?ssl_certfile=…, ?ssl_keyfile=…, ?ssl_cert_reqs=none
    redis+socket:///path[?virtual_host=db]
    sentinel://[user:password@]host:port[;sentinel://host:port…][/db]?master_name=NAME[&sentinel_password=…]
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    from redis import Redis

SCHEMES = ("redis", "rediss", "redis+socket", "sentinel")
_PORTS = {"sentinel": 26_379}
_TLS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_OPTIONS: dict[str, set[str]] = {
    "redis": set(),
    "rediss": _TLS,
    "redis+socket": {"virtual_host"},
    "sentinel": {"master_name", "sentinel_password"},
}
_CERT_REQS = {"required", "optional", "none"}


def is_redis(url: str) -> bool:
    """Whether a broker's URL speaks of a Redis."""
    return urlsplit(url).scheme in SCHEMES


@dataclass(frozen=True, kw_only=True, slots=True)
class RedisAddress:
    """A URL taken apart; `path` is a Unix socket's, `hosts` are the server's or the sentinels'."""

    scheme: str
    hosts: tuple[tuple[str, int], ...]
    path: str
    db: int
    username: str | None
    password: str | None = field(repr=False)
    options: dict[str, str] = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> Self:
        """Raises ValueError, without the password, for what is no such URL."""
        first, *others = url.split(";")
        parts = urlsplit(first)
        if parts.scheme not in SCHEMES:
            raise ValueError(f"must start with {' or '.join(f'{scheme}://' for scheme in SCHEMES)}")
        # What follows the last sentinel counts for all of them.
        last = urlsplit(others[-1]) if others else parts
        options = dict(parse_qsl(last.query, keep_blank_values=True))
        if unknown := sorted(options.keys() - _OPTIONS[parts.scheme]):
            known = ", ".join(sorted(_OPTIONS[parts.scheme])) or "none"
            raise ValueError(f"{parts.scheme}:// has no option {unknown[0]!r}; there is: {known}")
        if options.get("ssl_cert_reqs", "none") not in _CERT_REQS:
            raise ValueError(f"ssl_cert_reqs must be one of {', '.join(sorted(_CERT_REQS))}")
        if parts.scheme == "sentinel" and not options.get("master_name"):
            raise ValueError("sentinel:// needs the name of the master it watches: ?master_name=mymaster")
        path = unquote(parts.path) if parts.scheme == "redis+socket" else ""
        if parts.scheme == "redis+socket" and not path:
            raise ValueError("needs the path of a socket: redis+socket:///path/to/redis.sock")
        number = options.get("virtual_host", "0") if path else last.path.removeprefix("/") or "0"
        if not number.isdecimal():
            # Not repeated: behind a / in a password that was not encoded stands the rest of it.
            raise ValueError("what stands behind the host is no database's number; encode / ? # @ : in a password")
        hosts = []
        for text in [] if path else [first, *others]:
            host = urlsplit(text)
            if host.scheme != parts.scheme or not host.hostname:
                raise ValueError(f"needs a host: {parts.scheme}://host:port")
            hosts.append((host.hostname, host.port or _PORTS.get(parts.scheme, 6_379)))
        return cls(
            scheme=parts.scheme,
            hosts=tuple(hosts),
            path=path,
            db=int(number),
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            options=options,
        )

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must not be printed anywhere."""
        return tuple(s for s in (self.password, self.options.get("sentinel_password")) if s)

    def __str__(self) -> str:
        """Where it is, for messages."""
        if self.path:
            return f"{self.path}, database {self.db}"
        where = ", ".join(f"{host}:{port}" for host, port in self.hosts)
        watched = f", master {self.options['master_name']}" if self.scheme == "sentinel" else ""
        return f"{where}{watched}, database {self.db}"

    @property
    def celery_url(self) -> str:
        """For Celery's `broker_url` and `result_backend`."""
        if self.path:
            return f"redis+socket://{self._login}{quote(self.path)}?virtual_host={self.db}"
        query = f"?{urlencode(self._tls)}" if self.scheme == "rediss" else ""
        hosts = [f"{_bracketed(host)}:{port}" for host, port in self.hosts]
        return ";".join(f"{self.scheme}://{self._login}{host}/{self.db}{query}" for host in hosts)

    @property
    def celery_options(self) -> dict[str, Any]:
        """For both's transport options."""
        if self.scheme != "sentinel":
            return {}
        password = self.options.get("sentinel_password")
        return {
            "master_name": self.options["master_name"],
            "sentinel_kwargs": {"password": password} if password else {},
        }

    def client(self, *, seconds: float) -> "Redis":
        """A client that gives up connecting, and waiting for an answer, after `seconds`; text in and out.

        It is usable by several threads, and by a forked child. A command is tried a second time at once, for a
        connection that went stale.
        """
        from redis import Redis, Sentinel, SSLConnection, UnixDomainSocketConnection  # noqa: PLC0415 - see below
        from redis.backoff import NoBackoff  # noqa: PLC0415
        from redis.connection import ConnectionPool  # noqa: PLC0415
        from redis.retry import Retry  # noqa: PLC0415 - commands that need no Redis start faster without it

        options: dict[str, Any] = {
            "db": self.db,
            "username": self.username,
            "password": self.password,
            "decode_responses": True,
            "socket_timeout": seconds,
            "retry": Retry(NoBackoff(), 1),
            "health_check_interval": 30,
        }
        if self.path:
            unix: Callable[..., Any] = UnixDomainSocketConnection
            return Redis(connection_pool=ConnectionPool(connection_class=unix, path=self.path, **options))
        options |= {"socket_connect_timeout": seconds, "socket_keepalive": True}
        if self.scheme == "sentinel":
            sentinel: Any = Sentinel(  # type: ignore[no-untyped-call]
                self.hosts,
                sentinel_kwargs={
                    "password": self.options.get("sentinel_password"),
                    "socket_timeout": seconds,
                    "socket_connect_timeout": seconds,
                },
            )
            found: Redis = sentinel.master_for(self.options["master_name"], **options)
            return found
        if self.scheme == "rediss":
            check_hostname = self._tls.get("ssl_check_hostname", "true").lower() != "false"
            options |= {"connection_class": SSLConnection, **self._tls, "ssl_check_hostname": check_hostname}
        ((host, port),) = self.hosts
        return Redis(connection_pool=ConnectionPool(host=host, port=port, **options))

    @property
    def _login(self) -> str:
        if self.password is None and self.username is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.username or '', safe='')}{password}@"

    @property
    def _tls(self) -> dict[str, str]:
        # redis-py checks the certificate unless told not to; Celery insists on being told.
        return {"ssl_cert_reqs": "required", **self.options}


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
