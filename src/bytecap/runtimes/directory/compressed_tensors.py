"""compressed-tensors, `pack-quantized` and NVFP4 (`nvfp4`): what vLLM and transformers read.

Codes of 2 to 8 bits, packed along the columns without gaps, with a scale for a group of 32, 64 or 128 columns or for
the whole row (channel); without a zero point codes are signed, with one (`a` behind the scheme's name) a weight is
`scale * (code - zero)`, and zeros are packed along the rows. Linear maps only: embeddings and heads stay in the model's
floating-point type, because vLLM does not read them otherwise. vLLM joins projections that are given the same input,
and these must share a scheme.
Source: compressed_tensors/compressors/pack_quantized (Apache-2.0). Omitted: activations, sparsity, fp8, mxfp4.

>>> FAMILY.layout("w4g128", 256, "BF16").bits
4.125
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.errors import CheckpointError
from bytecap.model.building import pretrained
from bytecap.runtimes.blocks import BlockFormat, Codes
from bytecap.runtimes.blocks.stream import pack_words, unpack_words, words_of
from bytecap.runtimes.directory import Arrays, Scheme, Spec, nvfp4, split

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (0, 128, 64, 32)
_MENU = ("w4c", "w4g128", "w4g64", "w4g32", "w8c", "w8g128")
_SUFFIXES = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


class CompressedTensors:
    """The family."""

    name = "compressed-tensors"
    tables = heads = False
    bound = True
    mark = "pt"
    _schemes: Mapping[str, Scheme] = {
        f"w{b}{f'g{g}' if g else 'c'}{'' if s else 'a'}": Scheme(b, g, s)
        for b in BITS for g in GROUPS for s in (True, False)
    } | {nvfp4.NAME: Scheme(4, nvfp4.GROUP, symmetric=True, floating=True)}  # fmt: skip

    def schemes(self) -> tuple[str, ...]:
        """Names of all schemes."""
        return tuple(self._schemes)

    def menu(self) -> tuple[str, ...]:
        """Return the schemes of 4 and 8 bits that all readers know; more groups of 8 bits would gain nothing."""
        return _MENU

    def scheme(self, name: str) -> Scheme:
        """The scheme of a name."""
        return self._schemes[name]

    def layout(self, name: str, cols: int, float_type: str) -> BlockFormat | None:
        """Block format of a scheme."""
        s = self._schemes[name]
        block = s.width(cols)
        if cols <= 0 or cols % block or block % 8 or cols * s.bits % 32:  # rounding takes columns in eights
            return None
        if name == nvfp4.NAME:
            return nvfp4.layout()
        size = block * s.bits // 8 + 2
        top = 2 ** (s.bits - 1)
        if s.symmetric:
            return BlockFormat(name, size, block, block, -top, top - 1, (), code_zero=top, float_type=float_type)
        last = 2 * top - 1
        return BlockFormat(name, size, block, block, 0, last, (), minimums=last, float_type=float_type)

    def specs(self, form: BlockFormat, rows: int, cols: int) -> tuple[Spec, ...]:
        """Codes, scales, shape, and zeros."""
        if form.name == nvfp4.NAME:
            return nvfp4.specs(rows, cols)
        bits, groups = self._schemes[form.name].bits, cols // form.block
        shapes = ((rows, words_of(cols, bits)), (rows, groups), (2,), (words_of(rows, bits), groups))
        kinds = ("I32", form.float_type, "I64", "I32")
        found = tuple(Spec(*x) for x in zip(_SUFFIXES, kinds, shapes, strict=True))
        return found if form.minimums else found[:3]

    def arrays(self, codes: Codes) -> Arrays:
        """Codes, scales, shape, and zeros."""
        if codes.format.name == nvfp4.NAME:
            return nvfp4.arrays(codes)
        form, bits = codes.format, self._schemes[codes.format.name].bits

        def zeros() -> npt.NDArray[Any]:
            found = pack_words(np.ascontiguousarray(codes.sub_minimums.view(np.uint8).T), bits).T
            return np.ascontiguousarray(found).view(np.int32)

        return Arrays(
            lambda: pack_words(codes.codes.view(np.uint8) + np.uint8(form.code_zero), bits).view(np.int32),
            lambda: codes.scale.astype(np.float32), lambda: np.array(codes.codes.shape, np.int64),
            *((zeros,) if form.minimums else ()),
        )  # fmt: skip

    def codes(self, form: BlockFormat, arrays: Sequence[npt.NDArray[Any]]) -> Codes:
        """Codes from words, scales and zeros."""
        if form.name == nvfp4.NAME:
            return nvfp4.codes_of(arrays)
        words, scales, shape, *zeros = arrays
        rows, cols = (int(n) for n in shape)
        bits = self._schemes[form.name].bits
        kind = np.float16 if form.float_type == "F16" else np.float32
        stored = unpack_words(words.view(np.uint32), bits, cols)
        found = (stored - np.uint8(form.code_zero)).view(form.integer)
        ones, minimums = split(found, form)
        scale = scales.astype(kind)
        if not zeros:
            return Codes(form, found, ones, minimums, scale, np.zeros_like(scale))
        packed = np.ascontiguousarray(zeros[0].view(np.uint32).T)
        minimums = np.ascontiguousarray(unpack_words(packed, bits, rows).T).view(form.integer)
        return Codes(form, found, ones, minimums, scale, scale)

    def config(self, model: Mapping[str, Any], schemes: Mapping[str, str], plain: Sequence[str]) -> dict[str, Any]:
        """With `quantization_config`: a group for every scheme, with the names of its modules."""
        groups: dict[str, list[str]] = {}
        for module, name in schemes.items():
            groups.setdefault(name, []).append(module)
        formats = {name: nvfp4.FORMAT if name == nvfp4.NAME else "pack-quantized" for name in groups}
        several = len(set(formats.values())) > 1
        entries = {
            f"group_{i}": {"targets": targets, "weights": _weights(self._schemes[name])}
            | ({"format": formats[name]} if several else {})
            for i, (name, targets) in enumerate(sorted(groups.items()))
        }
        found = {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision" if several else next(iter(formats.values()), ""),
            "quantization_status": "compressed", "config_groups": entries, "ignore": list(plain),
        }  # fmt: skip
        return dict(model) | ({"quantization_config": found} if schemes else {})

    def read(self, config: Mapping[str, Any]) -> dict[str, str]:
        """Scheme of every module."""
        by_args = {tuple(sorted(_weights(s).items())): n for n, s in self._schemes.items()}
        found: dict[str, str] = {}
        for entry in config.get("quantization_config", {}).get("config_groups", {}).values():
            name = by_args[tuple(sorted(entry["weights"].items()))]
            found |= dict.fromkeys(entry["targets"], name)
        return found

    def check(self, directory: Path) -> str:
        """Let transformers build the model and match every tensor.

        Raises:
            CheckpointError: it cannot.
        """
        if importlib.util.find_spec("compressed_tensors") is None:
            return "not checked: compressed-tensors is not installed"
        schemes = self.read(json.loads((directory / "config.json").read_bytes())).values()
        if any(not self._schemes[n].symmetric for n in schemes):  # 0.20 allots room for them unpacked
            return "not checked: transformers loads no packed zero points with compressed-tensors 0.20"
        try:
            built: Any = pretrained(directory, output_loading_info=True)
            info: dict[str, Any] = built[1]
        except (ValueError, KeyError, TypeError, RuntimeError, OSError) as exc:
            line = next(iter(str(exc).splitlines()), type(exc).__name__)
            raise CheckpointError(f"transformers cannot load this model with compressed-tensors: {line}") from exc
        lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        if lost:
            raise CheckpointError(f"transformers does not take {lost[0]} ({len(lost)} tensors in all) of this model")
        return "transformers loads it"


def _weights(scheme: Scheme) -> dict[str, Any]:
    """Return the configuration's description of a scheme."""
    if scheme.floating:
        return nvfp4.weights()
    strategy: dict[str, Any] = {"strategy": "group", "group_size": scheme.group} if scheme.group else {
        "strategy": "channel"
    }  # fmt: skip
    return {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, **strategy}


FAMILY = CompressedTensors()
