"""Integer arrays in Postgres' binary format, built in C loops.

A commit of 1,500 batches carries 7,500 integers. psycopg's own list adapter looks at each of them to choose a type and
writes text; here the type is given, which makes commits from one Python client about twice as fast. Format:
`array_recv` in https://github.com/postgres/postgres/blob/master/src/backend/utils/adt/arrayfuncs.c
"""

import struct
import sys
from array import array
from collections.abc import Iterable
from typing import ClassVar, Literal

from psycopg.adapt import AdaptersMap, Buffer, Dumper
from psycopg.pq import Format


class Int4Array:
    """Values of an `int[]` parameter. Raises ValueError or TypeError for what does not fit."""

    element_oid: ClassVar[int] = 23
    code: ClassVar[Literal["i", "q"]] = "i"

    def __init__(self, values: Iterable[int]) -> None:
        # array() would take bytes and other buffers for memory to copy, not for numbers.
        try:
            self._values = array(self.code, values if isinstance(values, list | tuple) else list(values))
        except OverflowError as error:
            raise ValueError(f"{error}: pass integers of {32 if self.code == 'i' else 64} bits") from None

    def to_bytes(self) -> bytes:
        count, words = len(self._values), self._values.itemsize // 4
        if count == 0:
            return struct.pack(">iiI", 0, 0, self.element_oid)
        values = self._values[:]
        if sys.byteorder == "little":
            values.byteswap()
        big_endian = array("i", values.tobytes())
        # Each value stands behind its length; both are words of four bytes.
        body = array("i", struct.pack(">i", 4 * words)) * (count * (1 + words))
        for word in range(words):
            body[1 + word :: 1 + words] = big_endian[word::words]
        return struct.pack(">iiIii", 1, 0, self.element_oid, count, 1) + body.tobytes()


class Int8Array(Int4Array):
    """The same of a `bigint[]` parameter."""

    element_oid = 20
    code = "q"


class _Int4ArrayDumper(Dumper):
    format = Format.BINARY
    oid = 1007

    def dump(self, obj: Int4Array) -> Buffer:
        return obj.to_bytes()


class _Int8ArrayDumper(_Int4ArrayDumper):
    oid = 1016


def register(adapters: AdaptersMap) -> None:
    """Make a connection's or cursor's adapters know both types."""
    adapters.register_dumper(Int4Array, _Int4ArrayDumper)
    adapters.register_dumper(Int8Array, _Int8ArrayDumper)
