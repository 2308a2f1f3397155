"""A network that fails: a TCP proxy before a server, which can be slow, silent, cut off, and lose answers."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread
from types import TracebackType
from typing import Self

from tests.demo.programs import HOST

_CHUNK = 65_536
_POLL = 0.01
# ReadyForQuery, idle: Postgres says that a transaction is over.
_DONE = b"Z\x00\x00\x00\x05I"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a Unix socket's path, or a port of this machine."""

    socket: str | None = None
    port: int = 0


class Proxy:
    """Forwards connections to `target`, which may be changed. The flags count from the next bytes on.

    While `silent` nothing passes in either direction, as in a network that drops packets. Bytes are `delay` seconds
    late. The next `to_lose` answers with which Postgres ends a transaction are lost with their connections.
    """

    def __init__(self, target: Address) -> None:
        self.target = target
        self.silent = False
        self.delay = 0.0
        self.to_lose = 0
        self.lost = 0
        self.port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._started = Event()
        self._thread = Thread(target=self._serve, name="proxy", daemon=True)

    def cut(self) -> int:
        """Close all connections; returns how many there were."""
        return asyncio.run_coroutine_threadsafe(self._cut(), self._loop).result()

    def __enter__(self) -> Self:
        self._thread.start()
        self._started.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._connected, HOST, 0))
        self.port = server.sockets[0].getsockname()[1]
        self._started.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))

    async def _cut(self) -> int:
        writers = list(self._open)
        for writer in writers:
            writer.close()
        # Each connection has two ends.
        return len(writers) // 2

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pass()
        try:
            if self.target.socket is None:
                ends = await asyncio.open_connection(HOST, self.target.port)
            else:
                ends = await asyncio.open_unix_connection(self.target.socket)
        except OSError:
            writer.close()
            return
        both = {writer, ends[1]}
        self._open |= both
        try:
            with suppress(OSError, EOFError):
                await asyncio.gather(self._forward(reader, ends[1]), self._forward(ends[0], writer, is_answer=True))
        finally:
            for end in both:
                end.close()
            self._open -= both

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool = False
    ) -> None:
        while data := await reader.read(_CHUNK):
            await self._pass()
            if self.delay:
                await asyncio.sleep(self.delay)
            if is_answer and self.to_lose and _DONE in data:
                self.to_lose -= 1
                self.lost += 1
                break
            writer.write(data)
            await writer.drain()
        # One end is gone, so the other one is of no use.
        raise EOFError

    async def _pass(self) -> None:
        while self.silent:  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(_POLL)
