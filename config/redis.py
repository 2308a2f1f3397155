"""One Redis address, and what each of its clients takes: Kombu, Celery's results, RedBeat and our own.

Each of them understands other URLs and other options; this is the one place that knows which.

    redis://[user:password@]host[:port][/db]
    rediss://…                     with TLS; ?ssl_ca_certs=FILE, ?ssl_certfile=…, ?ssl_keyfile=…, ?ssl_cert_reqs=none
    redis+socket:///path[?virtual_host=db]
    sentinel://[user:password@]host:port[;sentinel://host:port…][/db]?master_name=NAME[&sentinel_password=…]
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    from redis import Redis

_TLS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs", "ssl_check_hostname"}
_SENTINEL = {"master_name", "sentinel_password"}
_OPTIONS = {"redis": set[str](), "rediss": _TLS, "redis+socket": {"virtual_host"}, "sentinel": _SENTINEL}
SCHEMES = tuple(_OPTIONS)
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
        hosts = [urlsplit(part) for part in url.split(";")]
        # What follows the last sentinel counts for all of them.
        parts, last = hosts[0], hosts[-1]
        if parts.scheme not in SCHEMES:
            raise ValueError(f"must start with {' or '.join(f'{scheme}://' for scheme in SCHEMES)}")
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
        if not path and not all(host.scheme == parts.scheme and host.hostname for host in hosts):
            raise ValueError(f"needs a host: {parts.scheme}://host:port")
        port = 26_379 if parts.scheme == "sentinel" else 6_379
        return cls(
            scheme=parts.scheme,
            hosts=() if path else tuple((host.hostname or "", host.port or port) for host in hosts),
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

    @property
    def celery_url(self) -> str:
        """For Celery's `broker_url` and `result_backend`; redis-py understands it, too, but for the other two kinds."""
        if self.path:
            return f"redis+socket://{self._login}{quote(self.path)}?virtual_host={self.db}"
        # redis-py checks the certificate unless told not to; Celery insists on being told.
        query = f"?{urlencode({'ssl_cert_reqs': 'required', **self.options})}" if self.scheme == "rediss" else ""
        hosts = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in self.hosts]
        return ";".join(f"{self.scheme}://{self._login}{host}/{self.db}{query}" for host in hosts)

    @property
    def celery_options(self) -> dict[str, Any]:
        """For both's transport options."""
        if self.scheme != "sentinel":
            return {}
        password = self.options.get("sentinel_password")
        sentinel = {"password": password} if password else {}
        return {"master_name": self.options["master_name"], "sentinel_kwargs": sentinel}

    def client(self, *, seconds: float) -> "Redis":
        """A client that gives up connecting, and waiting for an answer, after `seconds`; text in and out.

        It is usable by several threads, and by a forked child. A command is tried a second time at once, for a
        connection that went stale.
        """
        from redis import Redis, Sentinel  # noqa: PLC0415 - commands that need no Redis start faster without it
        from redis.backoff import NoBackoff  # noqa: PLC0415 - as above
        from redis.retry import Retry  # noqa: PLC0415 - as above

        timeouts: dict[str, Any] = {"socket_timeout": seconds, "socket_connect_timeout": seconds}
        retry = Retry(NoBackoff(), 1)
        options = {**timeouts, "decode_responses": True, "retry": retry, "health_check_interval": 30}
        if self.path:
            return Redis.from_url(f"unix://{self._login}{quote(self.path)}?db={self.db}", **options)
        options["socket_keepalive"] = True
        if self.scheme != "sentinel":
            return Redis.from_url(self.celery_url, **options)
        watched = self.celery_options
        sentinel: Any = Sentinel(self.hosts, sentinel_kwargs=watched["sentinel_kwargs"] | timeouts)  # type: ignore[no-untyped-call]
        login = {"db": self.db, "username": self.username, "password": self.password}
        found: Redis = sentinel.master_for(watched["master_name"], **login, **options)
        return found

    @property
    def _login(self) -> str:
        if self.password is None and self.username is None:
            return ""
        password = "" if self.password is None else f":{quote(self.password, safe='')}"
        return f"{quote(self.username or '', safe='')}{password}@"
