"""Integer arrays in Postgres' binary format, built in C loops.

A commit of 1,500 batches carries 7,500 integers. psycopg's own list adapter looks at each of them to choose a type and
writes text; here the type is given, which makes commits from one Python client about twice as fast. Format:
`array_recv` in https://github.com/postgres/postgres/blob/master/src/backend/utils/adt/arrayfuncs.c
"""

import struct
import sys
from array import array
from collections.abc import Iterable
from typing import ClassVar

from psycopg.adapt import AdaptersMap, Buffer, Dumper
from psycopg.pq import Format

_HEADER = struct.Struct(">iiIii")


class Int4Array:
    """Values of an `int[]` parameter. Raises OverflowError or TypeError for what does not fit."""

    element_oid: ClassVar[int] = 23

    def __init__(self, values: Iterable[int]) -> None:
        self._values = array("i", _plain(values))

    def __len__(self) -> int:
        return len(self._values)

    def to_bytes(self) -> bytes:
        count = len(self._values)
        words = array("i", bytes(8 * count))
        words[0::2] = array("i", [4]) * count
        words[1::2] = self._values
        return _header(self.element_oid, count) + _big_endian(words)


class Int8Array:
    """Values of a `bigint[]` parameter. Raises OverflowError or TypeError for what does not fit."""

    element_oid: ClassVar[int] = 20

    def __init__(self, values: Iterable[int]) -> None:
        self._values = array("q", _plain(values))

    def __len__(self) -> int:
        return len(self._values)

    def to_bytes(self) -> bytes:
        count = len(self._values)
        halves = array("i")
        halves.frombytes(self._values.tobytes())
        high, low = (1, 0) if sys.byteorder == "little" else (0, 1)
        words = array("i", bytes(12 * count))
        words[0::3] = array("i", [8]) * count
        words[1::3] = halves[high::2]
        words[2::3] = halves[low::2]
        return _header(self.element_oid, count) + _big_endian(words)


def _plain(values: Iterable[int]) -> Iterable[int]:
    # array() would take bytes and other buffers for memory to copy, not for numbers.
    return values if isinstance(values, list | tuple) else list(values)


def _header(element_oid: int, count: int) -> bytes:
    if count == 0:
        return struct.pack(">iiI", 0, 0, element_oid)
    return _HEADER.pack(1, 0, element_oid, count, 1)


def _big_endian(words: "array[int]") -> bytes:
    if sys.byteorder == "little":
        words.byteswap()
    return words.tobytes()


class _Int4ArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1007

    def dump(self, obj: Int4Array) -> Buffer:
        return obj.to_bytes()


class _Int8ArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1016

    def dump(self, obj: Int8Array) -> Buffer:
        return obj.to_bytes()


def register(adapters: AdaptersMap) -> None:
    """Make a connection's or cursor's adapters know both types."""
    adapters.register_dumper(Int4Array, _Int4ArrayDumper)
    adapters.register_dumper(Int8Array, _Int8ArrayDumper)
