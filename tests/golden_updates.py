"""Golden updates: files that name a base, each with the files it stands on; written by `make_goldens.py`."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from bytecap.format import container
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.container import CODE, INDEX, TABLES, UNIT, Base, Contents, FileSection
from bytecap.format.decoder import decode_units
from bytecap.format.entropy.shared_tables import dump_shared
from bytecap.format.overlays.difference import CODER as DIFFERENCE
from bytecap.format.overlays.order import CODER as ORDER
from bytecap.format.updates import BaseFile, attached
from golden_parts import SHARED, build, exact, grid, index, pack, sealed, tiny, trellis, unit, vector


class Update(NamedTuple):
    """A file, the names of the files that it is read with, and the error it raises then (None: it is sound)."""

    data: bytes
    bases: tuple[str, ...] = ("base",)
    error: str | None = None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def stored(name: str, text: bytes, kind: int = container.FILE) -> FileSection:
    return FileSection(name, b"\x00" + text, kind)


def base() -> bytes:
    """The file below: matrices, a transposed one, a tied one, a vector, integers, side files and code."""
    return pack(
        unit("a.weight", (24, 40), 9, trellis((24, 40)), linear=True),
        unit("turned", (30, 8), 1, grid((8, 30), seed=6), transposed=True, linear=True),
        unit("embed", (10, 6), 1, grid((10, 6), seed=9), aliases=("head",), linear=True),
        unit("norm", (40,), 2, vector(np.arange(40) / 8)),
        unit("count", (), 3, exact(np.array([[7]]), "I64"), "I64"),
        unit("kept", (5,), 2, vector([1, 2, 3, 4, 9])),
        files=[stored("config.json", b"{}"), stored("tokenizer.json", b"[1]"), stored("run.py", b"pass", CODE)],
    )


def difference(inner: tuple[int, bytes], *more: tuple[int, bytes]) -> bytes:
    """A stack over the base's values."""
    return STACK.encode((16, b""), [(DIFFERENCE.tag, DIFFERENCE.encode(inner)), *more])


def update(*units, on: bytes | None = None, dropped=(), files=(), **more) -> bytes:
    below = Base(sha256(base() if on is None else on), tuple(dropped))
    return container.serialize(
        Contents(units, dump_shared(SHARED), tuple(files), {}, more.get("padding", 0), base=below)
    )  # fmt: skip


def first() -> bytes:
    """An update in which every kind of unit changes in some way."""
    return update(
        unit("a.weight", (24, 40), 5, difference((9, trellis((24, 40), seed=3))), linear=True),
        unit("turned", (30, 8), 5, difference((1, grid((8, 30), seed=2))), "BF16", transposed=True, linear=True),
        unit("embed", (10, 6), 5, difference((2, vector(np.arange(60) % 7)), (ORDER.tag, ORDER.encode(
            np.arange(10)[::-1]))), aliases=("head",), linear=True),
        unit("norm", (40,), 2, vector(np.arange(40) / 4)),
        unit("count", (), 3, exact(np.array([[8]]), "I64"), "I64"),
        files=[stored("config.json", b'{"a":1}'), stored("new.json", b"2")], dropped=["run.py"],
    )  # fmt: skip


def whole() -> dict[str, bytes]:
    """Files that need no base, by name: what updates stand on."""
    return {"base": base(), "other": tiny()}


def _sound() -> Iterator[tuple[str, Update]]:
    yield "all", Update(first())
    yield "nothing", Update(update())
    long = difference((15, trellis((24, 40), seed=4, first=1, memory=6)))
    yield "long", Update(update(unit("a.weight", (24, 40), 5, long, linear=True)))
    yield "same", Update(update(unit("norm", (40,), 16, b"")))
    second = update(
        unit("a.weight", (24, 40), 5, difference((9, trellis((24, 40), seed=5, first=1))), linear=True),
        unit("norm", (40,), 5, difference((2, vector(np.arange(40) % 3)))), on=first(), dropped=["new.json"],
    )  # fmt: skip
    yield "second", Update(second, ("all", "base"))
    yield "on_empty", Update(update(unit("kept", (5,), 5, difference((2, vector([1] * 5)))), on=update()),
                             ("base", "nothing"))  # fmt: skip


def _broken() -> Iterator[tuple[str, Update]]:
    good, corrupt = first(), "CorruptError"
    norm = difference((2, vector(np.arange(40) % 3)))
    yield "no_base", Update(good, (), "BaseError")
    yield "another", Update(good, ("other",), "BaseError")
    yield "one_too_many", Update(good, ("base", "other"), "BaseError")
    yield "not_needed", Update(base(), ("other",), "BaseError")
    yield "chain_cut", Update(update(on=good), ("all",), "BaseError")
    yield "base_damaged", Update(update(on=sealed(base()[:-1])), ("cut",), corrupt)
    yield "unknown_unit", Update(update(unit("more", (40,), 5, norm)), error=corrupt)
    yield "by_alias", Update(update(unit("head", (40,), 5, norm)), error=corrupt)
    yield "shape", Update(update(unit("norm", (40, 1), 5, norm)), error=corrupt)
    yield "flags", Update(update(unit("norm", (40,), 5, norm, linear=True)), error=corrupt)
    yield "aliases", Update(update(unit("norm", (40,), 5, norm, aliases=("norm2",))), error=corrupt)
    yield "dropped_unknown", Update(update(dropped=["no.json"]), error=corrupt)
    yield "dropped_twice", Update(update(dropped=["run.py", "run.py"]), error=corrupt)
    yield "dropped_before", Update(update(dropped=["run.py"], on=good), ("base", "all"), corrupt)
    for name, data in {
        "base_bytes": STACK.encode((16, b"\0"), [(41, b"\2" + vector(np.zeros(40)))]),
        "no_coder": STACK.encode((16, b""), [(41, b"")]),
        "inner_exact": difference((3, exact(np.zeros((1, 40), np.float32), "F32"))),
        "inner_stack": difference((5, norm)),
        "inner_short": difference((2, vector(np.zeros(40))[:-1])),
        "left_over": difference((2, vector(np.zeros(40)) + b"\0")),
        "overflow": difference((2, struct.pack("<ffB", 3e38, 0, 0)), (41, b"\2" + struct.pack("<ffB", 3e38, 0, 0))),
        "more_layers": STACK.encode((16, b""), [(41, b"\2" + vector(np.zeros(40)))] * 17),
    }.items():
        yield name, Update(update(unit("norm", (40,), 5, data)), error=corrupt)
    yield "without_base", Update(pack(unit("norm", (40,), 5, norm)), (), corrupt)
    yield "bare_without_base", Update(pack(unit("norm", (40,), 16, b"")), (), corrupt)
    hash_of = sha256(base())
    for name, value in {
        "none": [], "text": hash_of, "short": [hash_of[1:], []], "upper": [hash_of.upper(), []], "null": None,
        "no_list": [hash_of, "x"], "number": [7, []], "more": [hash_of, [], []], "names": [hash_of, [1]],
    }.items():  # fmt: skip
        raw = index().replace(b'"files"', f'"base": {str(value).replace("None", "null")}, "files"'.encode())
        yield f"index_{name}", Update(build([(INDEX, raw.replace(b"'", b'"'))]), (), corrupt)
    raw = index(("norm", [40], "F32", 5, 0, []), base=[hash_of, []])
    yield (
        "unused_object",
        Update(
            build([(INDEX, raw), (TABLES, dump_shared(SHARED)), (7, b"\4\2" + b"\1\1"), (UNIT, norm)]), error=corrupt
        ),
    )


def updates() -> dict[str, Update]:
    """All golden updates by name; broken ones begin with `bad_`."""
    return dict(_sound()) | {f"bad_{name}": u for name, u in _broken()}


def with_bases(data: bytes, bases: Sequence[bytes]) -> Contents:
    """Contents of a file on the files that it is an update of."""
    found = {sha256(b): BaseFile(f"base {i}", b) for i, b in enumerate(bases)}
    return attached(container.parse(data), found, "the update")


@cache
def known() -> dict[str, BaseFile]:
    """Golden files that others stand on, by SHA-256."""
    made = whole() | {name: u.data for name, u in _sound()}
    return {sha256(data): BaseFile(name, data) for name, data in made.items()}


def needed(contents: Contents) -> dict[str, BaseFile]:
    """Those that a file stands on."""
    found: dict[str, BaseFile] = {}
    while contents.base is not None and (file := known().get(contents.base.sha256)) is not None:
        found[contents.base.sha256] = file
        contents = container.parse(file.data)
    return found


def on_known(contents: Contents) -> Contents:
    """A file on golden files, where it stands on them."""
    return attached(contents, needed(contents), "the update")


def files(digest: Callable[[dict[str, np.ndarray]], str]) -> dict[str, bytes]:
    """Every file of the directory; `expected.json` has the bases of each update, and its digest or an error."""
    stored = whole() | {"cut": sealed(base()[:-1])} | {name: u.data for name, u in updates().items()}
    expected = {}
    for name, (data, bases, error) in sorted(updates().items()):
        below = [stored[b] for b in bases]
        expected[name] = [bases, error or digest(decode_units(with_bases(data, below)))]
    found = {f"{name}.bcap": data for name, data in stored.items()}
    return found | {"expected.json": (json.dumps(expected, indent=1) + "\n").encode()}
