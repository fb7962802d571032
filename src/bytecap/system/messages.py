"""Turn values into bytes and back, for processes of one job that send them to one another.

JSON with numpy arrays and bytes in it, whose contents follow the text. Numbers come back exactly. Unlike a pickle,
bytes say values only, never what to call.

>>> import numpy as np
>>> value = unpacked(packed({"kl": 0.1, "counts": np.arange(3), "section": b"ab", "none": None, "nan": float("nan")}))
>>> value["kl"], value["counts"].tolist(), value["section"], value["none"], value["nan"]
(0.1, [0, 1, 2], b'ab', None, nan)
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import numpy.typing as npt

_MARK = "~"
_HEAD = 8  # bytes of the text's length


def packed(value: Any) -> bytes:
    """Return a value as bytes.

    Args:
        value: dictionaries with names for keys, lists, tuples (read back as lists), numbers, text, None, bytes, arrays.
    """
    parts: list[bytes] = []

    def plain(item: Any) -> Any:
        if isinstance(item, dict):
            assert _MARK not in item  # noqa: S101 (no name of ours)
            return {k: plain(v) for k, v in item.items()}
        if isinstance(item, list | tuple):
            return [plain(v) for v in item]
        if isinstance(item, np.ndarray):
            parts.append(np.ascontiguousarray(item).tobytes())
            return {_MARK: [len(parts[-1]), item.dtype.str, list(item.shape)]}
        if isinstance(item, bytes):
            parts.append(item)
            return {_MARK: [len(item)]}
        return item

    text = json.dumps(plain(value)).encode()
    return b"".join([len(text).to_bytes(_HEAD, "little"), text, *parts])


def unpacked(data: bytes | bytearray) -> Any:
    """Return the value that `packed` was given."""
    length = int.from_bytes(data[:_HEAD], "little")
    at = _HEAD + length

    def array(size: int, form: list[Any]) -> Any:
        nonlocal at
        part, at = memoryview(data)[at : at + size], at + size
        if not form:
            return bytes(part)
        dtype, shape = form
        found: npt.NDArray[Any] = np.frombuffer(bytearray(part), dtype).reshape(shape)  # which may be written to
        return found

    def whole(item: Any) -> Any:
        if isinstance(item, dict):
            if _MARK in item:
                size, *form = item[_MARK]
                return array(size, form)
            return {k: whole(v) for k, v in item.items()}
        return [whole(v) for v in item] if isinstance(item, list) else item

    return whole(json.loads(data[_HEAD : _HEAD + length]))
