"""Read a `.gguf` file as a model: weights dequantized, config and tokenizer taken from its metadata.

transformers does both, through gguf-py. The values are those that a GGUF runtime computes with, so a file made from
them is compared with the quantized model, not with the one before it.

>>> import numpy as np
>>> as_dtype(np.float32([1.0, 0.5])), as_dtype(np.float32([1 / 3]))
('BF16', 'F32')
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.format.coders.exact import is_lossless
from bytecap.model.bounds import hurried
from bytecap.model.building import check_config, check_holds, quiet, unheard
from bytecap.model.fileset import TOKENIZER
from bytecap.system.atomic import open_regular

SUFFIX = ".gguf"
_DERIVED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # the config says them too


_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of values by GGUF's types
_STRING, _ARRAY = 8, 9
_MOST_DEPTH, _MOST_DIMENSIONS, _MOST_VALUES = 4, 8, 1 << 48


def as_dtype(values: npt.NDArray[Any]) -> str:
    """Convert to the narrowest float dtype that holds all values."""
    return next((d for d in ("BF16", "F16") if is_lossless(values, d)), "F32")


def read(path: Path) -> tuple[dict[str, Any], dict[str, bytes], tuple[str, ...]]:
    """Read tensors by their names in transformers, side files, and notes.

    Raises:
        CheckpointError: it cannot be read, is of an architecture transformers does not know, or is not read whole.
    """
    try:
        import accelerate  # noqa: F401 (transformers asks for it)
        import gguf
        import torch
        import transformers
    except ImportError as exc:
        raise CheckpointError(f"{path} needs the extra packages ({exc.name}): pip install 'bytecap[gguf]'") from exc
    quiet()
    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    check_header(path)
    try:
        inside = {t.name: int(t.n_elements) for t in gguf.GGUFReader(path).tensors}
        with hurried(CheckpointError(f"the metadata of {path} take minutes to be read")):
            config = transformers.AutoConfig.from_pretrained(path.parent, trust_remote_code=False, **options)
        check_config(config.to_dict(), str(path))
        check_holds(config, {n: (size,) for n, size in inside.items()}, str(path))
        with unheard():
            built: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, **options
            )
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **options)
    except CheckpointError:
        raise
    except Exception as exc:
        first = next((line for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise CheckpointError(f"{path} cannot be read by transformers: {first}") from exc
    module, report = built
    _check_whole(path, inside, module, report)
    files = _side_files(module, tokenizer)
    return dict(module.state_dict()), files, (f"{path.name} is dequantized: it is what is measured against",)


def check_header(path: Path) -> None:
    """Refuse a file whose metadata reach beyond its end: readers go through counts that the file merely claims.

    Raises:
        CheckpointError: it is no GGUF file, or a damaged one.
    """
    with open_regular(path, os.O_RDONLY, follow=True) as f:
        size = path.stat().st_size
        content = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        try:
            _Header(content, size).read()
        except (struct.error, ValueError) as exc:
            raise CheckpointError(f"{path} is no sound GGUF file: {exc}") from exc
        finally:
            if isinstance(content, mmap.mmap):
                content.close()


class _Header:
    """Walks through the head of a GGUF file, every step of which stays inside the file."""

    def __init__(self, content: mmap.mmap | bytes, size: int) -> None:
        self._content, self._at, self._size, self._order = content, 0, size, "<"

    def read(self) -> None:
        """Read keys and descriptions of tensors."""
        if self._content[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
        if not self._number("I") & 0xFFFF:  # the version, written by a machine of the other byte order
            self._order = ">"
        tensors, keys = self._number("Q"), self._number("Q")
        if tensors > self._size or keys > self._size:
            raise ValueError(f"it claims {tensors:,} tensors and {keys:,} keys")
        for _ in range(keys):
            self._skip(self._number("Q"))
            self._value(self._number("I"), 0)
        for _ in range(tensors):
            self._skip(self._number("Q"))
            dimensions = self._number("I")
            if dimensions > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions:,} dimensions")
            if math.prod(self._number("Q") for _ in range(dimensions)) > _MOST_VALUES:
                raise ValueError("a tensor has more values than any model")
            self._skip(4 + 8)

    def _number(self, kind: str) -> int:
        found: int = struct.unpack_from(self._order + kind, self._content, self._at)[0]
        self._skip(struct.calcsize(kind) if kind == "I" else 8)
        return found

    def _skip(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            raise ValueError(f"its metadata reach beyond its {self._size:,} bytes")

    def _value(self, kind: int, depth: int) -> None:
        if kind in _WIDTHS:
            self._skip(_WIDTHS[kind])
        elif kind == _STRING:
            self._skip(self._number("Q"))
        elif kind == _ARRAY and depth < _MOST_DEPTH:
            inner, count = self._number("I"), self._number("Q")
            if inner in _WIDTHS:
                self._skip(count * _WIDTHS[inner])
                return
            if count > self._size:
                raise ValueError(f"an array claims {count:,} members")
            for _ in range(count):
                self._value(inner, depth + 1)
        else:
            raise ValueError(f"a key has the unknown type {kind}, or arrays nested too deep")


def _check_whole(path: Path, inside: dict[str, int], module: Any, report: dict[str, Any]) -> None:
    """Refuse a file some of whose tensors have not become the model's, as far as their sizes show."""
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(
                f"{path} and the model of its metadata differ ({kind}): {min(map(str, report[kind]))}"
            )
    tensors = {n: t.numel() for n, t in module.state_dict().items()}
    fewest = sum(p.numel() for p in module.parameters())
    held = sum(size for name, size in inside.items() if name not in _DERIVED)
    if not fewest <= held <= sum(tensors.values()):
        raise CheckpointError(
            f"{path} holds {held:,} values, the model that transformers makes of it {fewest:,}: it is not read whole"
        )


def _side_files(module: Any, tokenizer: Any) -> dict[str, bytes]:
    """Return config, tokenizer and chat template as files."""
    config = module.config.to_dict()
    for key in ("quantization_config", "_pre_quantization_dtype", "_name_or_path"):
        config.pop(key, None)
    config |= {"dtype": "float32", "architectures": [type(module).__name__]}
    files = {
        "config.json": (json.dumps(config, indent=2, sort_keys=True, default=str) + "\n").encode(),
        TOKENIZER: tokenizer.backend_tokenizer.to_str().encode(),
    }
    if isinstance(tokenizer.chat_template, str):
        files["chat_template.jinja"] = tokenizer.chat_template.encode()
    return files


def dtypes(tensors: dict[str, Any]) -> dict[str, str]:
    """Return source dtypes, the narrowest that hold the values, whatever blocks these came from."""
    return {n: as_dtype(t.numpy()) for n, t in tensors.items() if t.is_floating_point()}
