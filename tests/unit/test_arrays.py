"""Arrays in Postgres' binary format, decoded by hand as `array_recv` would."""

import struct
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from db.arrays import Int4Array, Int8Array

INT4_MIN, INT4_MAX = -(2**31), 2**31 - 1
INT8_MIN, INT8_MAX = -(2**63), 2**63 - 1


def decoded(data: bytes, oid: int, width: int) -> list[int]:
    dimensions, nulls, element = struct.unpack_from(">iiI", data)
    assert (nulls, element) == (0, oid)
    if dimensions == 0:
        assert len(data) == 12
        return []
    count, lower = struct.unpack_from(">ii", data, 12)
    assert (dimensions, lower) == (1, 1)
    values = []
    for position in range(20, len(data), 4 + width):
        (length,) = struct.unpack_from(">i", data, position)
        assert length == width
        values.append(int.from_bytes(data[position + 4 : position + 4 + width], "big", signed=True))
    assert len(values) == count
    return values


@pytest.mark.parametrize("values", [[], [0], [1, -1], [INT4_MIN, INT4_MAX], list(range(1500))])
def test_int4_array(values: list[int]) -> None:
    assert decoded(Int4Array(values).to_bytes(), 23, 4) == values


@pytest.mark.parametrize("values", [[], [0], [1, -1], [INT8_MIN, INT8_MAX, 2**32, -(2**32)], list(range(1500))])
def test_int8_array(values: list[int]) -> None:
    assert decoded(Int8Array(values).to_bytes(), 20, 8) == values


@settings(derandomize=True, database=None)
@given(st.lists(st.integers(INT8_MIN, INT8_MAX)), st.lists(st.integers(INT4_MIN, INT4_MAX)))
def test_every_integer_survives(wide: list[int], narrow: list[int]) -> None:
    assert decoded(Int8Array(wide).to_bytes(), 20, 8) == wide
    assert decoded(Int4Array(narrow).to_bytes(), 23, 4) == narrow


@pytest.mark.parametrize("value", [INT4_MIN - 1, INT4_MAX + 1, 2**200])
def test_int4_refuses_what_does_not_fit(value: int) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        Int4Array([value])


@pytest.mark.parametrize("value", [INT8_MIN - 1, INT8_MAX + 1, 2**200])
def test_int8_refuses_what_does_not_fit(value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        Int8Array([value])


@pytest.mark.parametrize("kind", [Int4Array, Int8Array])
@pytest.mark.parametrize("values", [[1.0], ["1"], [None], "12"])
def test_what_is_no_integer_is_refused(kind: type[Int4Array | Int8Array], values: Sequence[int]) -> None:
    with pytest.raises(TypeError):
        kind(values)


@pytest.mark.parametrize("values", [array("q", [1, 2, 3]), (1, 2, 3), range(1, 4), iter([1, 2, 3]), b"\1\2\3"])
def test_any_iterable_of_integers_is_taken_value_by_value(values: Sequence[int]) -> None:
    """Bytes too: they are a sequence of integers, not machine words."""
    assert decoded(Int4Array(values).to_bytes(), 23, 4) == [1, 2, 3]
