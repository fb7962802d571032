"""Find the parts of quantized weights among the tensors of a checkpoint, scheme by scheme.

A scheme names its codes, scales and zero points by endings of its own. What a config says of it, where layouts differ
without a trace in the tensors (zero points of GPTQ's two versions), is read here as well; a layout that is none of
those known is named, never guessed. Omitted: layouts that one kernel has shuffled for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bytecap.errors import CheckpointError
from bytecap.model import dequantize
from bytecap.model.building import parts
from bytecap.model.fileset import SETTINGS_BESIDE, Header, read_object

Parts = Mapping[str, str]  # role to the name of a stored tensor
Formula = Callable[[Mapping[str, Tensor]], Tensor]

FLOAT8 = ("F8_E4M3", "F8_E5M2")
_SCALES_OF_8 = ("_scale_inv", "_scale")  # behind the weight's name
_SCALES_BESIDE = ("scale", "qscale_weight")  # in place of `weight`
_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
            "mxfp4-pack-quantized", "mixed-precision", "dense")  # fmt: skip
_LAYOUT_KEYS = ("format", "checkpoint_format", "version")  # in which writers of GPTQ and AWQ name it
_ZEROS_OFF = {"gptq": 1, "gptq_v2": 0}  # what the stored zero points of a format of GPTQ lack
_MLX = "quantization"  # where MLX describes one
_ROLES = {  # of tensors of compressed-tensors, behind the weight's name
    "scales": "_scale", "shape": "_shape", "zeros": "_zero_point", "whole": "_global_scale", "order": "_g_idx",
}  # fmt: skip
_WIDTHS = range(1, 9)  # bits of packed integers
_USUAL_WIDTHS = (2, 4, 8)  # where a config does not say them


@dataclass(frozen=True)
class Weight:
    """A weight in parts."""

    parts: Parts
    formula: Formula


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return what a config says of the quantization of its weights, itself or nested; None if it is dense."""
    for part in parts(config):
        mlx = part.get(_MLX)
        if isinstance(mlx, dict) and {"group_size", "bits"} <= mlx.keys():
            return {**mlx, "quant_method": "mlx"}
        found = part.get("quantization_config", part.get("compression_config"))
        if isinstance(found, dict) and found:
            return found
    return None


def settings_at(config: Mapping[str, Any], names: Iterable[str], where: Path) -> Mapping[str, Any] | None:
    """Return what a directory says of the quantization of its weights, also in a file of AutoGPTQ or AutoAWQ; or None.

    Such a file counts only beside codes: it may have stayed behind when weights were dequantized.

    Args:
        config: `config.json`.
        names: of the tensors.
        where: the directory.

    Raises:
        CheckpointError: such a file is broken, or names another layout than the config.
    """
    said = settings_of(config)
    if not any(n.endswith("qweight") for n in names):
        return said
    for name, method in SETTINGS_BESIDE.items():
        beside = read_object(where / name)
        if not beside:
            continue
        beside = beside if "quant_method" in beside or "method" in beside else {**beside, "quant_method": method}
        if said is None:
            return beside
        both = [f"{method_of(s)} {_said_layout(s)}".lower() for s in (said, beside)]
        if both[0] != both[1]:
            raise CheckpointError(
                f"{where}: config.json says {both[0]}, {name} {both[1]}: remove the one that is wrong"
            )
    return said


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the name of a quantization's method."""
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        return "bitsandbytes"
    method, form = settings.get("quant_method", settings.get("method")), settings.get("format")
    return str(method or ("compressed-tensors" if form in _FORMATS else form) or "an unnamed method")


def layout_not_read(settings: Mapping[str, Any]) -> str | None:
    """Return the name of a method's layout, empty if it has none, where it is one that is not read; else None."""
    method, found = method_of(settings), None
    if method == "compressed-tensors" and settings.get("format", "dense") not in _FORMATS:
        found = settings["format"]
    elif method == "gptq":
        said = _said_layout(settings)
        found = said if said not in _ZEROS_OFF else None
        if found is None and settings.get("bits") not in dequantize.GPTQ_BITS:
            return ""
    elif method == "mlx":
        modes = {str(e.get("mode", "affine")) for e in (settings, *settings.values()) if isinstance(e, dict)}
        found = " or ".join(sorted(modes - {"affine"})) or None
    elif method == "awq":
        said = _said_layout(settings)
        found = said if said not in {"gemm", "GEMM"} else None
        if found is None and settings.get("bits", settings.get("w_bit")) != 4:
            return ""
    return None if found is None else str(found)[:40]


def _said_layout(settings: Mapping[str, Any]) -> str:
    """Return the layout that a config of GPTQ or AWQ names, under one key or another; two that differ are none."""
    if settings.get("is_marlin_format"):
        return "marlin"
    if settings.get("backend") == "llm-awq":
        return "llm-awq"
    said = dict.fromkeys(str(settings[k]) for k in _LAYOUT_KEYS if settings.get(k))
    return " or ".join(said) or ("gemm" if method_of(settings) == "awq" else "gptq")


def _float8(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Float8 weights with a scale for the whole, a row, or a block."""
    block = settings.get("weight_block_size")
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int for n in block)):
        raise CheckpointError(f"quantization_config: weight_block_size is {str(block)[:40]}, not two numbers")
    if block is not None and min(block) < 1:
        raise CheckpointError(f"quantization_config: weight_block_size {block} holds a number below 1")

    def formula(parts: Mapping[str, Tensor]) -> Tensor:
        return dequantize.block_scaled(parts["codes"], parts["scales"], block)

    for name, entry in entries.items():
        stem = name.rpartition(".")[0]
        beside = [f"{stem}.{s}" for s in _SCALES_BESIDE] if name.endswith(".weight") else []
        scale = next((n for n in (*(name + s for s in _SCALES_OF_8), *beside) if n in entries), None)
        if entry["dtype"] in FLOAT8 and scale is not None:
            yield name, Weight({"codes": name, "scales": scale}, formula)


def _mxfp4(entries: Header, _: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Stacks of matrices in blocks of four-bit floats."""
    for name in entries:
        stem = name.removesuffix("_blocks")
        if stem != name and f"{stem}_scales" in entries:
            parts = {"codes": name, "scales": f"{stem}_scales"}
            yield stem, Weight(parts, lambda p: dequantize.experts(p["codes"], p["scales"]))


def _bitsandbytes(entries: Header, _: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Code books of 16 values in blocks, and rows of eight bits."""
    for name, entry in entries.items():
        stem = name.removesuffix("weight")
        if entry["dtype"] == "I8" and f"{stem}SCB" in entries:
            parts = {"codes": name, "scales": f"{stem}SCB"}
            if f"{name}_format" in entries:
                parts["format"] = f"{name}_format"
            yield name, Weight(parts, _int8)
        state = next((n for n in _states(name) if n in entries), None)
        if state is not None:
            parts = {"codes": name, "state": state} | {
                role: f"{name}.{role}" for role in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
                if f"{name}.{role}" in entries
            }  # fmt: skip
            yield name, Weight(parts, _book)


def _states(name: str) -> tuple[str, str]:
    return f"{name}.quant_state.bitsandbytes__nf4", f"{name}.quant_state.bitsandbytes__fp4"


def _int8(parts: Mapping[str, Tensor]) -> Tensor:
    if int(parts["format"].reshape(-1)[0]) if "format" in parts else 0:
        raise dequantize.Misfit("its rows are in the order of a GPU's kernel (weight_format)")
    return dequantize.rows_of_int8(parts["codes"], parts["scales"])


def _book(parts: Mapping[str, Tensor]) -> Tensor:
    inner = [parts["nested_absmax"], parts["nested_quant_map"]] if "nested_absmax" in parts else []
    state = dequantize.parse_state(parts["state"])
    return dequantize.code_book(parts["codes"], parts["absmax"], parts["quant_map"], state, inner)


def _compressed(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Packed and plain integers, and floats of four and eight bits, as the tensors themselves tell."""
    groups = settings.get("config_groups")
    members = groups.values() if isinstance(groups, dict) else ()
    weights = [g.get("weights") for g in members if isinstance(g, dict)]
    said = [w.get("num_bits") for w in weights if isinstance(w, dict)]
    widths = sorted({n for n in said if type(n) is int and n in _WIDTHS})

    def packed(p: Mapping[str, Tensor]) -> Tensor:
        rest = p.get("zeros"), widths or _USUAL_WIDTHS, p.get("order")
        return dequantize.packed_integers(p["codes"], p["scales"], p["shape"], *rest)

    def floats(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.global_scaled(p["codes"], p["scales"], p.get("whole"))

    def plain(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.integers(p["codes"], p["scales"], p.get("zeros"), p.get("order"))

    for name, entry in entries.items():
        stem = name.removesuffix("_packed")
        if f"{stem}_scale" not in entries:
            continue
        parts = {"codes": name} | {r: stem + s for r, s in _ROLES.items() if stem + s in entries}
        if stem != name and entry["dtype"] == "I32" and "shape" in parts:
            yield stem, Weight(parts, packed)
        elif stem != name and entry["dtype"] == "U8" and "zeros" not in parts:
            if "order" in parts:
                raise CheckpointError(f"{name} holds floats and {parts['order']} an order of groups, which is not read")
            yield stem, Weight(parts, floats)
        elif entry["dtype"] in (*FLOAT8, "I8"):
            yield name, Weight(parts, plain)


def _gptq(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Integers of 2 to 8 bits with a scale and a zero point for groups of inputs, in any order."""
    off = _ZEROS_OFF[_said_layout(settings)]
    size, own = settings.get("group_size"), bool(settings.get("dynamic"))  # where layers may have sizes of their own
    group = size if type(size) is int and size > 0 and not own else None

    def formula(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.gptq(p["codes"], p["zeros"], p["scales"], p.get("order"), group, off)

    return _layers(entries, {"zeros": "qzeros", "scales": "scales"}, {"order": "g_idx"}, formula)


def _awq(entries: Header, _: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Integers of 4 bits with a scale and a zero point for groups of inputs, the even outputs of eight first."""

    def formula(p: Mapping[str, Tensor]) -> Tensor:
        return dequantize.awq(p["codes"], p["zeros"], p["scales"])

    return _layers(entries, {"zeros": "qzeros", "scales": "scales"}, {}, formula)


def _mlx(entries: Header, settings: Mapping[str, Any]) -> Iterator[tuple[str, Weight]]:
    """Integers of 2 to 8 bits with a scale and a bias for groups of inputs; modules may have sizes of their own."""

    def formula(said: Any) -> Formula:
        group, bits = said.get("group_size"), said.get("bits")
        if type(group) is not int or type(bits) is not int or group < 1 or bits not in _WIDTHS:
            raise CheckpointError(f"quantization: {str(bits)[:40]} bits in groups of {str(group)[:40]} are none of MLX")
        return lambda p: dequantize.affine(p["codes"], p["scales"], p["biases"], group, bits)

    for name, entry in entries.items():
        stem = name.removesuffix(".weight")
        beside = {"scales": f"{stem}.scales", "biases": f"{stem}.biases"}
        if stem != name and entry["dtype"] == "U32" and all(n in entries for n in beside.values()):
            own = settings.get(stem)
            yield name, Weight({"codes": name, **beside}, formula(own if isinstance(own, dict) else settings))


def _layers(
    entries: Header, needed: Mapping[str, str], optional: Mapping[str, str], formula: Formula
) -> Iterator[tuple[str, Weight]]:
    """Layers whose codes are `qweight`, with what lies beside them by role."""
    for name, entry in entries.items():
        stem = name.removesuffix("qweight")
        if stem == name or entry["dtype"] != "I32" or any(stem + n not in entries for n in needed.values()):
            continue
        beside = {role: stem + n for role, n in {**needed, **optional}.items() if stem + n in entries}
        yield f"{stem}weight", Weight({"codes": name, **beside}, formula)


FINDERS: dict[str, Callable[[Header, Mapping[str, Any]], Iterator[tuple[str, Weight]]]] = {
    "fp8": _float8, "fbgemm_fp8": _float8, "mxfp4": _mxfp4, "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed, "gptq": _gptq, "awq": _awq,
    "mlx": _mlx,
}  # fmt: skip
