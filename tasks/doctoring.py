"""The doctor's look at what is not Postgres: Redis, and the environment."""

import difflib
import os
from collections.abc import Iterator, Mapping
from time import time
from typing import Any
from urllib.parse import urlsplit

from redis import Redis, RedisError

from config.redis import is_redis
from config.settings import Settings
from db.doctor import judge_clock
from db.findings import Finding, Level

_PREFIX = "TIDEMARK_"
# Read by the tests alone.
_TESTS = "TIDEMARK_TEST_"
_OLDEST, _NEWEST = (6, 2), 8
_SECONDS = 5.0
_FULL = 0.9


def check_broker(broker_url: str, redis_url: str | None) -> Iterator[Finding]:
    """Every Redis there is; another kind of broker is only named."""
    if not is_redis(broker_url):
        yield Finding(area="redis", check="broker", level=Level.OK, found=f"{urlsplit(broker_url).scheme}, not a Redis")
    urls = {url: None for url in (broker_url, redis_url) if url is not None and is_redis(url)}
    for number, url in enumerate(urls):
        name = "Redis" if number == 0 else "Redis for results"
        try:
            yield from _check_redis(name, url)
        except (RedisError, ValueError) as error:
            yield Finding(
                area="redis",
                check=name,
                level=Level.FAIL,
                found="does not answer",
                why=f"{type(error).__name__}: {' '.join(str(error).split())}",
                mend=("start it, or correct TIDEMARK_BROKER_URL and TIDEMARK_REDIS_URL",),
            )


def _check_redis(name: str, url: str) -> Iterator[Finding]:
    with Redis.from_url(
        url.replace("redis+socket://", "unix://", 1),
        decode_responses=True,
        socket_connect_timeout=_SECONDS,
        socket_timeout=_SECONDS,
    ) as client:
        info: dict[str, Any] = {}
        # Sections one by one: managed servers may leave some out.
        for section in ("server", "memory", "persistence", "stats"):
            info |= client.info(section)
        before = time()
        seconds, microseconds = client.time()
        after = time()
    yield _version(name, str(info.get("redis_version", "")))
    yield _eviction(name, info)
    yield _persistence(name, info)
    yield from _writable(name, info)
    yield judge_clock(name, int(seconds) + int(microseconds) / 1e6, before, after)


def _version(name: str, version: str) -> Finding:
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < _OLDEST:
        return Finding(
            area="redis",
            check=name,
            level=Level.FAIL,
            found=version or "unknown version",
            why="Tidemark needs 6.2 or later.",
            mend=("upgrade Redis",),
        )
    if numbers[0] > _NEWEST:
        return Finding(
            area="redis",
            check=name,
            level=Level.WARN,
            found=version,
            why=f"Tidemark was tested up to {_NEWEST}.",
            mend=("install a newer tidemark",),
        )
    return Finding(area="redis", check=name, level=Level.OK, found=version)


def _eviction(name: str, info: Mapping[str, Any]) -> Finding:
    policy = str(info.get("maxmemory_policy", "unknown"))
    limit, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
    check = f"{name}: eviction"
    if policy != "noeviction":
        return Finding(
            area="redis",
            check=check,
            # Without a limit nothing is evicted, yet.
            level=Level.FAIL if limit else Level.WARN,
            found=policy,
            why="Under pressure Redis throws away queues, tokens and leases without a word.",
            mend=("redis-cli config set maxmemory-policy noeviction", "redis-cli config rewrite"),
        )
    if limit and used > _FULL * limit:
        return Finding(
            area="redis",
            check=check,
            level=Level.WARN,
            found=f"{policy}, {used / limit:.0%} full",
            why="When it is full, nothing can be queued.",
            mend=(f"redis-cli config set maxmemory {2 * limit}", "redis-cli config rewrite"),
        )
    return Finding(area="redis", check=check, level=Level.OK, found=policy)


def _persistence(name: str, info: Mapping[str, Any]) -> Finding:
    check = f"{name}: append-only file"
    if int(info.get("aof_enabled", 0)):
        return Finding(area="redis", check=check, level=Level.OK, found="on")
    return Finding(
        area="redis",
        check=check,
        level=Level.WARN,
        found="off",
        why="A restart of Redis loses what is queued; it is found again, but only by the next sweep.",
        mend=("redis-cli config set appendonly yes", "redis-cli config rewrite"),
    )


def _writable(name: str, info: Mapping[str, Any]) -> Iterator[Finding]:
    for key, what in (("rdb_last_bgsave_status", "snapshot"), ("aof_last_write_status", "append-only file")):
        status = str(info.get(key, "ok"))
        if status != "ok":
            yield Finding(
                area="redis",
                check=f"{name}: {what}",
                level=Level.FAIL,
                found=f"last write: {status}",
                why="Redis may refuse writes until its disk takes them again.",
                mend=("free space on Redis' disk, or look into its log",),
            )
    if info.get("loading"):
        yield Finding(
            area="redis",
            check=name,
            level=Level.WARN,
            found="loading its data",
            why="It answers no commands until it is done.",
        )


def check_environment(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Variables that look like ours and are none."""
    known = {f"{_PREFIX}{name}".upper() for name in Settings.model_fields}
    # Names are read without regard to case, as pydantic-settings does.
    unknown = sorted(
        name
        for name in environment
        if name.upper().startswith(_PREFIX) and name.upper() not in known and not name.upper().startswith(_TESTS)
    )
    for name in unknown:
        near = difflib.get_close_matches(name.upper(), known, n=1)
        yield Finding(
            area="environment",
            check=name,
            level=Level.WARN,
            found="no setting of Tidemark's",
            why="It has no effect." + (f" Did you mean {near[0]}?" if near else ""),
            mend=(f"unset {name}",),
        )
    if not unknown:
        count = sum(name.upper() in known for name in environment)
        yield Finding(area="environment", check=f"{_PREFIX}…", level=Level.OK, found=f"{count} set, all known")
