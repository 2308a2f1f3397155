"""The store that the brokers upload to: a directory, or a bucket of S3 behind a prefix.

A key is that of `tidemark.objects`, relative to the directory or the prefix, with `/` in between. Keys come in the
order of their bytes, which is that of the column: so bucket and table can be compared page by page.

The age of an upload is told by the store's own clock, never by this machine's: a wrong one would make every upload old.

What a store does not do ends as StoreError, one line. Deleting what is not there is no error.
"""

import asyncio
import errno
import heapq
import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol

from config.errors import SettingsError, StoreError
from config.settings import Settings

# S3 lists and deletes no more in one request.
_PAGE = 1_000
# A directory is read in parts of this many names, however many there are.
_NAMES = 100_000
# Seconds for one request, repetitions included: a store that hangs must not hold a worker.
_ANSWER_SECONDS = 30.0
_CONNECT_SECONDS = 5
_READ_SECONDS = 15
# Requests at a time, where each is for one key.
_AT_ONCE = 32
# A key of S3 has no more bytes, its prefix included.
_KEY_BYTES = 1024


class Upload(NamedTuple):
    """What lies under a key, and how many seconds it has been there at least."""

    key: str
    age: float


class Store(Protocol):
    def walk(self, after: str) -> Iterator[Upload]:
        """The uploads whose keys follow `after`, by the bytes of their keys; never all of them in memory.

        What is uploaded or deleted meanwhile may be in it or not. A key that is no text has lone surrogates.
        """

    def existing(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys under which something lies at this moment."""

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete what lies under the keys; returns those that are left, each with the reason."""


def open_store(settings: Settings) -> Store:
    """The store that the settings name. Raises SettingsError where they name none, or what it takes is not there."""
    url = settings.object_store
    if url is None:
        raise SettingsError("TIDEMARK_OBJECT_STORE is not set here: set it for the workers as it is set for beat")
    kind, _, place = url.partition("://")
    return Directory(place) if kind == "file" else Bucket(place, settings.object_store_options or {})


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


class Directory:
    """The regular files below a directory. What is a link is left alone, and so is what lies behind one; a key that
    is no plain path, such as `a//b` or `../a`, names no file.
    """

    def __init__(self, root: str) -> None:
        self._root = os.fsencode(root.rstrip("/"))

    def walk(self, after: str) -> Iterator[Upload]:
        try:
            # A file system of another machine has a clock of its own, which this file shows. It has no name, so a crash
            # leaves nothing behind.
            with tempfile.TemporaryFile(dir=self._root) as probe:
                now = os.fstat(probe.fileno()).st_mtime
            yield from self._below(b"", after.encode(), now)
        except OSError as error:
            raise self._error(error) from error

    def existing(self, keys: Sequence[str]) -> set[str]:
        return {key for key in keys if self._is_file(key)}

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        try:
            os.stat(self._root)
        except OSError as error:
            # A file system that is not mounted is no empty store.
            raise self._error(error) from error
        left = {}
        for key in keys:
            try:
                if self._is_file(key):
                    os.unlink(self._path(key))
            except FileNotFoundError:
                pass
            except (OSError, StoreError) as error:
                left[key] = _said(error)
        return left

    def _below(self, prefix: bytes, after: bytes, now: float) -> Iterator[Upload]:
        last = b""
        while True:
            try:
                with os.scandir(self._root + b"/" + prefix) as entries:
                    children = filter(None, (_child(prefix, entry) for entry in entries))
                    # A directory counts with its slash: so `a-b` comes before `a/c`, as it does by bytes.
                    page = heapq.nsmallest(
                        _NAMES, (c for c in children if c > last and (c > after or after.startswith(c)))
                    )
            except FileNotFoundError:
                # Deleted since its name was read; the root itself must be there.
                if not prefix:
                    raise
                return
            for child in page:
                if child.endswith(b"/"):
                    yield from self._below(child, after, now)
                    continue
                try:
                    found = os.lstat(self._root + b"/" + child)
                except FileNotFoundError:
                    continue
                # A copy may bring the time of its original; the change of the file itself is not older than it is.
                age = now - max(found.st_mtime, found.st_ctime)
                if child > after:
                    yield Upload(child.decode(errors="surrogateescape"), age)
            if len(page) < _NAMES:
                return
            last = page[-1]

    def _path(self, key: str) -> bytes:
        return self._root + b"/" + key.encode()

    def _is_file(self, key: str) -> bool:
        if {"", ".", ".."} & set(key.split("/")):
            return False
        try:
            return stat.S_ISREG(os.lstat(self._path(key)).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno in {errno.ENAMETOOLONG, errno.ELOOP}:
                return False
            raise self._error(error) from error

    def _error(self, error: OSError) -> StoreError:
        return StoreError(
            f"object store file://{os.fsdecode(self._root)}: {_said(error)}. See that the directory is mounted, and "
            f"that the workers' user may read, write and delete in it."
        )


def _child(prefix: bytes, entry: "os.DirEntry[bytes]") -> bytes | None:
    if entry.is_dir(follow_symlinks=False):
        return prefix + entry.name + b"/"
    return prefix + entry.name if entry.is_file(follow_symlinks=False) else None


class Bucket:
    """The objects of a bucket below a prefix, through s3fs: it finds credentials, repeats requests, and has the loop.

    Listing is consistent: what was uploaded before a request is in its answer.
    """

    def __init__(self, place: str, options: dict[str, Any]) -> None:
        try:
            import aiohttp  # noqa: PLC0415 - an extra, for those who have their uploads in S3
            import botocore.exceptions  # noqa: PLC0415
            import s3fs  # noqa: PLC0415
        except ImportError as error:
            raise SettingsError(
                f"TIDEMARK_OBJECT_STORE is in S3, and {error.name} is not installed: install Tidemark with the extra "
                f"store, as in pip install '.[store]'"
            ) from None
        self._bucket, _, prefix = place.partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._failures = (OSError, aiohttp.ClientError, botocore.exceptions.BotoCoreError)
        limits = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"max_attempts": 2},
            "max_pool_connections": _AT_ONCE,
            **(options.get("config_kwargs") or {}),
        }
        try:
            # Its cache of instances would hand one to a child that was made before the fork.
            self._fs: Any = s3fs.S3FileSystem(**{**options, "config_kwargs": limits, "skip_instance_cache": True})
            self._fs.connect()
        except (TypeError, ValueError) as error:
            raise SettingsError(
                f"TIDEMARK_OBJECT_STORE_OPTIONS: s3fs does not take them: {_said(error)}. See s3fs.S3FileSystem for "
                f"what there is."
            ) from None

    def walk(self, after: str) -> Iterator[Upload]:
        last = after
        while True:
            start = {"StartAfter": self._prefix + last} if last else {}
            page = self._run(self._call, "list_objects_v2", Prefix=self._prefix, MaxKeys=_PAGE, **start)
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for found in page.get("Contents", ()):
                key = found["Key"].removeprefix(self._prefix)
                if not key:
                    # The prefix itself, as consoles make it.
                    continue
                if key <= last:
                    raise StoreError(
                        f"{self._name}: lists {key!r} after {last!r}, which is not the order of their bytes; a "
                        f"directory bucket of S3 cannot be reconciled. Use a general purpose bucket."
                    )
                last = key
                yield Upload(key, (now - found["LastModified"]).total_seconds())
            if not page.get("IsTruncated"):
                return

    def existing(self, keys: Sequence[str]) -> set[str]:
        async def one(key: str) -> bool:
            try:
                await self._call("head_object", Key=self._prefix + key)
            except FileNotFoundError:
                return False
            return True

        legal = [key for key in keys if self._is_legal(key)]
        found: set[str] = set()
        for first in range(0, len(legal), _AT_ONCE):
            group = legal[first : first + _AT_ONCE]
            answers = self._run(_gather, [one(key) for key in group])
            found.update(key for key, is_there in zip(group, answers, strict=True) if is_there)
        return found

    def delete(self, keys: Sequence[str]) -> dict[str, str]:
        # XML, in which S3 takes many keys at once, has no form for control characters.
        plain = [key for key in keys if self._is_legal(key) and key.isprintable()]
        odd = [key for key in keys if self._is_legal(key) and not key.isprintable()]
        left: dict[str, str] = {}
        for first in range(0, len(plain), _PAGE):
            named = [{"Key": self._prefix + key} for key in plain[first : first + _PAGE]]
            answer = self._run(self._call, "delete_objects", Delete={"Objects": named, "Quiet": True})
            for error in answer.get("Errors", ()):
                key = error["Key"].removeprefix(self._prefix)
                left[key] = f"{error.get('Code')}: {error.get('Message')}"
        for first in range(0, len(odd), _AT_ONCE):
            group = odd[first : first + _AT_ONCE]
            self._run(_gather, [self._call("delete_object", Key=self._prefix + key) for key in group])
        return left

    def _is_legal(self, key: str) -> bool:
        return len((self._prefix + key).encode()) <= _KEY_BYTES

    async def _call(self, method: str, **arguments: Any) -> Any:
        return await self._fs._call_s3(method, Bucket=self._bucket, **arguments)  # noqa: SLF001 - call_s3, awaited

    def _run(self, function: Any, *arguments: Any, **named: Any) -> Any:
        from fsspec.asyn import sync  # noqa: PLC0415 - as above

        try:
            return sync(self._fs.loop, function, *arguments, timeout=_ANSWER_SECONDS, **named)
        except self._failures as error:
            raise StoreError(
                f"{self._name}: {_said(error)}. See that it is reachable with TIDEMARK_OBJECT_STORE_OPTIONS, and that "
                f"the credentials may list, read and delete."
            ) from error

    @property
    def _name(self) -> str:
        return f"object store s3://{self._bucket}/{self._prefix}"


async def _gather(coroutines: Sequence[Any]) -> list[Any]:
    return await asyncio.gather(*coroutines)
