"""One binary layout for arrays with a header: in the spool, in the ingest socket, over REST and in the live page.

    bytes 0-3     magic b"MLB1"
    bytes 4-7     uint32, little-endian: length of the header, H, a multiple of 8
    bytes 8-8+H   the header: UTF-8 JSON, padded with spaces. Its key "arrays" lists
                  {"name", "dtype", "shape", "offset"}, offsets in bytes from 8+H
    then          the arrays: C order, little-endian, each at a multiple of 8 bytes

`dtype` is one of uint8, uint16, uint32, int32, float32, float64: what a browser's typed arrays can view without a copy.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

MAGIC = b"MLB1"
DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32", "int32", "float32", "float64")}
_PREFIX = struct.Struct("<4sI")


class BlockError(ValueError):
    """The bytes are not a block, or claim what they do not hold."""


def _pad8(size: int) -> int:
    return -size % 8


def encode(header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The block of `header` (JSON-able, without the key "arrays") and `arrays`. Raises BlockError for other dtypes."""
    listed, parts, offset = [], [], 0
    for name, array in arrays.items():
        dtype = DTYPES.get(array.dtype.name)
        if dtype is None:
            raise BlockError(f"array {name}: dtype {array.dtype.name} is not one of {', '.join(DTYPES)}")
        data = np.ascontiguousarray(array, dtype=dtype).tobytes()
        pad = _pad8(len(data))
        listed.append({"name": name, "dtype": array.dtype.name, "shape": list(array.shape), "offset": offset})
        parts += [data, b"\0" * pad]
        offset += len(data) + pad
    text = json.dumps({**header, "arrays": listed}, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * _pad8(len(text))
    return b"".join([_PREFIX.pack(MAGIC, len(text)), text, *parts])


def decode(data: bytes | memoryview) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header (without "arrays") and read-only views into `data`. Raises BlockError for anything malformed."""
    view = memoryview(data)
    if len(view) < _PREFIX.size:
        raise BlockError("shorter than a block's prefix")
    magic, length = _PREFIX.unpack_from(view)
    start = _PREFIX.size + length
    if magic != MAGIC or length % 8 or start > len(view):
        raise BlockError("not a block")
    try:
        header = json.loads(bytes(view[_PREFIX.size : start]))
        listed = header.pop("arrays")
        arrays = {item["name"]: _view(view, start, item) for item in listed}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BlockError(f"malformed block: {error}") from error
    return header, arrays


def _view(view: memoryview, start: int, item: dict[str, Any]) -> NDArray[Any]:
    dtype, shape, offset = DTYPES[item["dtype"]], item["shape"], item["offset"]
    if any(not isinstance(n, int) or n < 0 for n in (*shape, offset)) or len(shape) > 8:
        raise ValueError("bad shape or offset")
    count = math.prod(shape)
    if start + offset + count * dtype.itemsize > len(view):
        raise ValueError(f"array {item['name']} reaches past the end")
    return np.frombuffer(view, dtype=dtype, count=count, offset=start + offset).reshape(shape)
