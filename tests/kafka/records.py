"""Kafka's record batches (version 2): what a broker reads in their header, and the one field that it writes."""

import struct
from typing import NamedTuple

from aiokafka.record.util import calc_crc32c

# https://kafka.apache.org/documentation/#recordbatch: base offset, length of what follows it, leader epoch, magic, CRC,
# attributes, delta of the last offset, base and greatest timestamp, producer's id and epoch, base sequence, records.
_HEADER = struct.Struct(">qiibIhiqqqhii")
_BASE_OFFSET = struct.Struct(">q")
# The length counts from behind itself. The CRC covers what follows it, and so not the base offset.
_LENGTH_FROM, _CRC_FROM, _MAGIC = 12, 21, 2
_LOG_APPEND_TIME, _TRANSACTIONAL, _CONTROL = 8, 16, 32


class BatchHeader(NamedTuple):
    """What Tidemark is told of a batch. Milliseconds, -1 for no time; producer id -1: it is not idempotent."""

    n_records: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int


def read_header(data: bytes | None) -> BatchHeader | None:
    """The header of exactly one batch, as a producer may send it; None where it is not sound."""
    if data is None or len(data) < _HEADER.size:
        return None
    _, length, _, magic, crc, attributes, last, _, newest, producer, epoch, sequence, count = _HEADER.unpack_from(data)
    if magic != _MAGIC or length != len(data) - _LENGTH_FROM or crc != calc_crc32c(memoryview(data)[_CRC_FROM:]):
        return None
    # Times are the producers' own. Transactions, and the control batches that end them, are not known here.
    if count < 1 or count != last + 1 or attributes & (_LOG_APPEND_TIME | _TRANSACTIONAL | _CONTROL):
        return None
    return BatchHeader(count, newest, producer, epoch, sequence)


def with_base_offset(data: bytes, base_offset: int) -> bytes:
    """The batch as consumers get it. Producers count from 0: only Tidemark knows the offset."""
    return _BASE_OFFSET.pack(base_offset) + data[_BASE_OFFSET.size :]
