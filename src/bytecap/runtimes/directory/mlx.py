"""MLX: affine groups, as mlx and mlx-lm read them.

A group of 32, 64 or 128 columns has a scale and a bias in the model's floating-point type, and codes of 2, 3, 4, 5, 6
or 8 bits in one stream of words a row; a weight is `scale * code + bias`. Every module may have a scheme of its own
(`quantization` in config.json). Names are the checkpoint's own: mlx-lm takes these and turns them into its own.
Source: mlx/ops (`quantize`), mlx_lm/utils.py (`load_model`), MIT. Omitted: mxfp4, nvfp4, mxfp8.

>>> FAMILY.layout("w4g64", 256, "BF16").bits
4.5
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.runtimes.blocks import BlockFormat, Codes
from bytecap.runtimes.blocks.stream import pack_words, unpack_words, words_of
from bytecap.runtimes.directory import Arrays, Scheme, Spec, split

BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)


class Mlx:
    """The family."""

    name = "mlx"
    tables = heads = True
    bound = False
    mark = "mlx"
    _schemes: Mapping[str, Scheme] = {f"w{b}g{g}": Scheme(b, g, symmetric=False) for b in BITS for g in GROUPS}

    def schemes(self) -> tuple[str, ...]:
        """Names of all schemes."""
        return tuple(self._schemes)

    def menu(self) -> tuple[str, ...]:
        """All of them compete."""
        return self.schemes()

    def scheme(self, name: str) -> Scheme:
        """The scheme of a name."""
        return self._schemes[name]

    def layout(self, name: str, cols: int, float_type: str) -> BlockFormat | None:
        """Block format of a scheme."""
        s = self._schemes[name]
        if cols % s.group:
            return None
        size = s.group * s.bits // 8 + 4
        return BlockFormat(name, size, s.group, s.group, 0, 2**s.bits - 1, (), minimums=1, float_type=float_type)

    def specs(self, form: BlockFormat, rows: int, cols: int) -> tuple[Spec, ...]:
        """Codes, scales, biases."""
        groups = (rows, cols // form.block)
        words = Spec("weight", "U32", (rows, words_of(cols, _bits(form))))
        return words, Spec("scales", form.float_type, groups), Spec("biases", form.float_type, groups)

    def arrays(self, codes: Codes) -> Arrays:
        """Codes, scales, biases."""
        return Arrays(
            lambda: pack_words(codes.codes.view(np.uint8), _bits(codes.format)),
            lambda: codes.scale.astype(np.float32), lambda: -codes.minimum.astype(np.float32),
        )  # fmt: skip

    def codes(self, form: BlockFormat, arrays: Sequence[npt.NDArray[Any]]) -> Codes:
        """Codes from words, scales and biases."""
        words, scales, biases = arrays
        kind = np.float16 if form.float_type == "F16" else np.float32
        found = unpack_words(words, _bits(form), scales.shape[1] * form.block).view(form.integer)
        ones, minimums = split(found, form)
        return Codes(form, found, ones, minimums + form.integer(1), scales.astype(kind), (-biases).astype(kind))

    def config(self, model: Mapping[str, Any], schemes: Mapping[str, str], plain: Sequence[str]) -> dict[str, Any]:
        """With `quantization`, an entry for every module; the numbers on top are for modules without one: none.

        Rotary parameters are repeated in the words of transformers 4, which is what most of mlx-lm's models read.
        """
        del plain
        found, rope = dict(model), model.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope:
            found.setdefault("rope_theta", rope["rope_theta"])
            if rope.get("rope_type", "default") != "default":
                found.setdefault("rope_scaling", {k: v for k, v in rope.items() if k != "rope_theta"})
        entries: dict[str, Any] = {"group_size": 64, "bits": 4}
        for module, name in schemes.items():
            s = self._schemes[name]
            entries[module] = {"group_size": s.group, "bits": s.bits}
        return found | ({"quantization": entries} if schemes else {})

    def read(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Scheme of every module."""
        entries = config.get("quantization", {})
        return {n: f"w{e['bits']}g{e['group_size']}" for n, e in entries.items() if isinstance(e, dict)}

    def check(self, directory: Path) -> str:
        """Let mlx-lm build the model and match every tensor.

        Raises:
            CheckpointError: it cannot.
        """
        if "model_file" in json.loads((directory / "config.json").read_bytes()):
            return "not checked: config.json names a file of code, which some versions of mlx-lm run"
        if importlib.util.find_spec("mlx") is None or importlib.util.find_spec("mlx_lm") is None:
            return "not checked: mlx-lm is not installed"
        load = importlib.import_module("mlx_lm.utils").load_model
        try:
            load(directory, lazy=True)
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            line = next(iter(str(exc).splitlines()), type(exc).__name__)
            raise CheckpointError(f"mlx-lm cannot load this model: {line}") from exc
        return "mlx-lm loads it"


def _bits(form: BlockFormat) -> int:
    return int(form.high).bit_length()


FAMILY = Mlx()
