"""Kafka's wire protocol: frames, headers, versions, and the order of answers. What requests mean is not known here."""

import asyncio
import io
import logging
import struct
from collections.abc import Awaitable, Callable, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from kio.index import load_request_schema, load_response_schema
from kio.schema.api_versions.v3.response import ApiVersion, ApiVersionsResponse
from kio.schema.errors import ErrorCode
from kio.serial import entity_reader, entity_writer
from kio.static.primitive import i16, i32, i32Timedelta
from kio.static.protocol import ResponsePayload

NO_THROTTLE = i32Timedelta.parse(timedelta(0))
# Requests of a connection that are worked on at the same time (clients keep to five), and the size of one.
_IN_FLIGHT, _FRAME_BYTES = 16, 100 * 2**20
_SIZE = struct.Struct(">i")
# How every request begins: API, version, correlation id.
_BEGINNING = struct.Struct(">hhi")
_API_VERSIONS = 18

log = logging.getLogger(__name__)


class Api(NamedTuple):
    """One kind of request, and its versions."""

    key: int
    oldest: int
    newest: int


# A request, or a part of one. kio has a class for each version: handlers read what those of the Api have in common.
Request = Any
# Answers in the newest version, and kio writes those fields that the client's has. None: it wants no answer.
Handler = Callable[[Request], Awaitable[ResponsePayload | None]]


class Server:
    def __init__(self, handlers: Mapping[Api, Handler]) -> None:
        self._handlers: dict[Api, Handler] = {Api(_API_VERSIONS, 0, 3): self._api_versions, **handlers}
        self._versions = {
            (api.key, version): (load_request_schema(api.key, version), load_response_schema(api.key, version), handler)
            for api, handler in self._handlers.items()
            for version in range(api.oldest, api.newest + 1)
        }

    async def _api_versions(self, _: object, error: ErrorCode = ErrorCode.none) -> ApiVersionsResponse:
        keys = (ApiVersion(api_key=i16(a), min_version=i16(b), max_version=i16(c)) for a, b, c in self._handlers)
        return ApiVersionsResponse(error_code=error, api_keys=tuple(keys), throttle_time=NO_THROTTLE)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, to its end. Requests are begun, and answered, in the order in which they came."""
        free = asyncio.Semaphore(_IN_FLIGHT)
        previous: asyncio.Task[None] | None = None
        try:
            async with asyncio.TaskGroup() as requests:
                while await free.acquire():
                    previous = requests.create_task(self._serve_one(await _frame(reader), previous, writer))
                    previous.add_done_callback(lambda _: free.release())
        except* (asyncio.IncompleteReadError, ConnectionError):
            pass
        except* Exception:
            # Postgres or the store is away, or it was no request of Kafka's. Clients connect again, here or elsewhere.
            log.exception("connection closed, with what it asked for not answered")
        finally:
            writer.close()

    async def _serve_one(self, frame: bytes, previous: "asyncio.Task[None] | None", to: asyncio.StreamWriter) -> None:
        key, version, correlation_id = _BEGINNING.unpack_from(frame)
        if (key, version) in self._versions:
            request_type, _, handler = self._versions[key, version]
            _, size = entity_reader(request_type.__header_schema__)(frame, 0)
            request, _ = entity_reader(request_type)(frame, size)
            response = await handler(request)
        elif key == _API_VERSIONS:
            # So that a newer client learns what there is.
            version, response = 0, await self._api_versions(None, ErrorCode.unsupported_version)
        else:
            raise ConnectionError(f"API {key} in version {version}, which was not offered")
        if previous is not None:
            await previous
        if response is not None:
            _, response_type, _ = self._versions[key, version]
            header, buffer = response_type.__header_schema__(correlation_id=i32(correlation_id)), io.BytesIO()
            entity_writer(type(header))(buffer, header)
            entity_writer(response_type)(buffer, response)
            to.write(_SIZE.pack(buffer.tell()) + buffer.getvalue())
            await to.drain()


async def _frame(reader: asyncio.StreamReader) -> bytes:
    (size,) = _SIZE.unpack(await reader.readexactly(_SIZE.size))
    if not _BEGINNING.size <= size <= _FRAME_BYTES:
        raise ConnectionError(f"a request of {size} bytes")
    return await reader.readexactly(size)
