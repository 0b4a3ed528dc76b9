"""Arrays with a header: there and back, and never a surprise from bytes that are none."""

from __future__ import annotations

import contextlib
import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spec.block import DTYPES, MAGIC, BlockError, decode, encode

ARRAYS = st.dictionaries(
    st.text(max_size=8),
    st.sampled_from(sorted(DTYPES)).flatmap(
        lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    ),
    max_size=4,
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
HEADERS = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "arrays"), st.recursive(SCALARS, st.lists, max_leaves=5), max_size=4)


@settings(max_examples=200, deadline=None)
@given(HEADERS, ARRAYS)
def test_there_and_back(header: dict[str, Any], arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    data = encode(header, arrays)
    assert len(data) % 8 == 0
    found, views = decode(data)
    assert found == header
    assert list(views) == list(arrays)
    for name, array in arrays.items():
        assert views[name].dtype == array.dtype and views[name].shape == array.shape
        assert views[name].tobytes() == array.tobytes()
        assert not views[name].flags.writeable


def test_the_layout_is_the_documented_one() -> None:
    data = encode({"type": "steps"}, {"a": np.arange(3, dtype=np.uint8), "b": np.array([[1.5]], dtype=np.float32)})
    magic, length = struct.unpack_from("<4sI", data)
    assert magic == MAGIC == b"MLB1" and length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    assert header == {
        "type": "steps",
        "arrays": [{"name": "a", "dtype": "uint8", "shape": [3], "offset": 0}, {"name": "b", "dtype": "float32", "shape": [1, 1], "offset": 8}],
    }
    assert data[8 + length :] == b"\0\1\2\0\0\0\0\0" + struct.pack("<f", 1.5) + b"\0\0\0\0"


def test_order_and_byte_order_of_memory_do_not_matter() -> None:
    array = np.arange(6, dtype=np.float64).reshape(2, 3)
    for same in (np.asfortranarray(array), array.astype(">f8"), np.repeat(array, 2, axis=1)[:, ::2]):
        assert encode({}, {"x": same}) == encode({}, {"x": array})


def test_other_dtypes_are_refused_by_name() -> None:
    with pytest.raises(BlockError, match="array x: dtype int64 is not one of uint8, uint16"):
        encode({}, {"x": np.zeros(1, dtype=np.int64)})


def raw(header: Any, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return MAGIC + struct.pack("<I", len(text)) + text + body


ITEM = {"name": "a", "dtype": "uint8", "shape": [2], "offset": 0}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"MLB1",
        b"MLB2" + bytes(4),
        raw([]),
        raw(1),
        raw({}),
        raw({"arrays": 1}),
        raw({"arrays": [1]}),
        raw({"arrays": [{**ITEM, "dtype": "object"}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "dtype": ["uint8"]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "name": ["a"]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": [9]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": [-1]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": [True, 2.0]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": 2}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": [0, 10**30]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": [0, 2**62, 2**62]}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "shape": [1] * 9}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "offset": -8}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "offset": 10**30}]}, bytes(8)),
        raw({"arrays": [{**ITEM, "offset": None}]}, bytes(8)),
        MAGIC + struct.pack("<I", 80_000) + b"[" * 80_000,
        MAGIC + struct.pack("<I", 8) + b"\xff" * 8,
        MAGIC + struct.pack("<I", 7) + b"{}     ",
        MAGIC + struct.pack("<I", 2**32 - 8) + b"{}",
    ],
)
def test_what_is_no_block_is_refused(data: bytes) -> None:
    with pytest.raises(BlockError):
        decode(data)


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.data())
def test_garbage_and_damage_raise_nothing_else(garbage: bytes, data: st.DataObject) -> None:
    whole = bytearray(encode({"step": 1}, {"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 3), dtype=np.uint16)}))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] = data.draw(st.integers(0, 255))
    for candidate in (garbage, MAGIC + garbage, bytes(whole), bytes(whole[:place])):
        with contextlib.suppress(BlockError):
            decode(candidate)
