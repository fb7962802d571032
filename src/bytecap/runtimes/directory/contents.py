"""A directory's files: which module is stored how, what that weighs, and the way back from the files to the model.

Nothing here chooses. Matrices of linear maps (and of tables, where the family can) may take one of the schemes that
hold their rows; everything else is kept in the model's 16-bit type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from bytecap.errors import CheckpointError, UsageError
from bytecap.format.decoder import from_matrix
from bytecap.format.ledger import Entry
from bytecap.model import streaming
from bytecap.model.checkpoint import Model
from bytecap.model.fileset import read_config
from bytecap.model.linears import linear_weights
from bytecap.model.quantized_copy import Lazy, Values
from bytecap.runtimes.blocks import BlockFormat, Codes
from bytecap.runtimes.directory import Family, family
from bytecap.runtimes.directory.tensors import Tensor, header, ordered, read
from bytecap.runtimes.gguf.places import Layout, Place
from bytecap.types import Unit

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
PLAIN = ("bf16", "f16")  # schemes' names of what is not quantized
_TYPES = {"BF16": "bfloat16", "F16": "float16"}
_NO_TABLES, _NO_HEADS = "this format quantizes no embeddings", "this format quantizes no output heads"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_PROBE = 8  # tokens of the pass that shows which modules share an input


@dataclass(frozen=True)
class Contents:
    """A directory before anything is chosen.

    Attributes:
        family: whose directory it is.
        model: that goes into it.
        float_type: F16 if the model is stored so, else BF16.
        places: matrices that schemes compete for.
        types: schemes that may hold each, by name, the plain one last.
        groups: by name, group of matrices that must share a scheme.
    """

    family: Family
    model: Model
    float_type: str
    places: tuple[Place, ...]
    types: Mapping[str, tuple[str, ...]]
    groups: Mapping[str, str]

    def layout(self, scheme: str, cols: int) -> BlockFormat | None:
        """Block format of a scheme; None for a plain one."""
        return None if scheme in PLAIN else self.family.layout(scheme, cols, self.float_type)

    def fitting(self, cols: int) -> tuple[str, ...]:
        """Return all schemes of the family that hold rows of so many columns, and the plain one."""
        return tuple(n for n in self.settings() if n in PLAIN or self.layout(n, cols))

    def settings(self) -> tuple[str, ...]:
        """All schemes; a point's setting is a place in this."""
        return (*self.family.schemes(), self.float_type.lower())

    def matrix(
        self, name: str, scheme: str, shape: tuple[int, int], codes: Callable[[], Any] | None = None
    ) -> list[Tensor]:
        """Tensors of a matrix in a scheme; their contents come of `codes`, whenever they are asked for."""
        form = self.layout(scheme, shape[1])
        if form is None:
            return [Tensor(name, self.float_type, shape)]
        base = name.removesuffix("weight")
        specs = self.family.specs(form, *shape)

        def made(number: int) -> Any:
            return None if codes is None else lambda: self.family.arrays(codes())[number]

        return [Tensor(base + s.suffix, s.dtype, s.shape, made(i)) for i, s in enumerate(specs)]

    def rate(self, name: str, scheme: str, shape: tuple[int, int]) -> int:
        """Bytes of a matrix in a scheme, its names and shapes in the header included."""
        tensors = self.matrix(name, scheme, shape)
        names = sum(len(f'"{t.name}":{{"dtype":"{t.dtype}","shape":{list(t.shape)},') for t in tensors)
        return names + sum(t.size for t in tensors)

    def config(self, schemes: Mapping[str, str]) -> bytes:
        """`config.json` under schemes of all matrices, by name."""
        found = {k: v for k, v in self.model.config().items() if k not in {"quantization", "quantization_config"}}
        found["torch_dtype" if "torch_dtype" in found else "dtype"] = _TYPES[self.float_type]
        kinds = linear_weights(self.model.module)
        stored = {n.removesuffix(".weight"): s for n, s in schemes.items() if s not in PLAIN}
        left = [n.removesuffix(".weight") for n, (m, _) in kinds.items() if isinstance(m, nn.Linear)]
        whole = self.family.config(found, stored, [n for n in left if n not in stored])
        return json.dumps(whole, separators=(",", ":")).encode()

    def tuned(self) -> Layout:
        """Everything that tuning may move: matrices, and vectors and tables of floating-point numbers."""
        tables = self.tables()
        plain = [u for u in self.model.units if u.dtype in _FLOATS and (len(u.shape) == 1 or u.name in tables)]
        return Layout("", (*self.places, *(Place(u.name, u.name, u.shape) for u in plain)))

    def tables(self) -> frozenset[str]:
        """Names of embeddings and output heads that stay in 16 bits because the family quantizes none."""
        held = {p.name for p in self.places}
        heads = {n for n, (m, _) in linear_weights(self.model.module).items() if m is head_of(self.model)}
        found = {*self.model.embeddings(), *heads}
        return frozenset(u.name for u in self.model.units if u.name in found and u.name not in held)

    def tensors(
        self, schemes: Mapping[str, str], codes: Mapping[str, Codes | None] | None = None,
        vectors: Mapping[str, Any] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """All tensors of the file; where nothing is quantized, `vectors` take the place of the model's values, by name.

        Contents, if there are `codes`, are made whenever they are asked for.
        """
        shapes = {p.name: (p.shape[0], p.shape[1]) for p in self.places}
        found = []
        for unit in self.model.units:
            scheme = schemes.get(unit.name, PLAIN[0])
            if scheme not in PLAIN:
                known = None if codes is None else partial(codes.__getitem__, unit.name)
                found += self.matrix(unit.name, scheme, shapes[unit.name], known)
            else:
                kind = self.float_type if unit.dtype in _FLOATS else unit.dtype
                values = None if codes is None else partial(self._plain, unit, vectors or {})
                found.append(Tensor(unit.name, kind, unit.shape, values))
        return found

    def _plain(self, unit: Unit, vectors: Mapping[str, Any]) -> npt.NDArray[Any]:
        own = vectors.get(unit.name)
        if own is not None:
            return np.asarray(own.reshape(unit.shape))
        values = self.model.tensor(unit).detach().cpu()
        return (values.float() if values.is_floating_point() else values).numpy()

    def size(self, schemes: Mapping[str, str]) -> int:
        """Bytes of the whole directory, to the byte."""
        tensors = ordered(self.tensors(schemes))
        weights = len(header(tensors, self.family.mark)) + sum(t.size for t in tensors)
        return weights + len(self.config(schemes)) + sum(len(f) for f in self.side_files().values())

    @cached_property
    def _side(self) -> dict[str, bytes]:
        return {n: compact(n, f) for n, f in self.model.files.items() if n != CONFIG}

    def side_files(self) -> dict[str, bytes]:
        """Tokenizer and other files that are copied, JSON without the white space between its words."""
        return self._side


def compact(name: str, data: bytes) -> bytes:
    """A file, or the same JSON in fewer bytes; a file that says something else then stays as it is.

    >>> compact("tokenizer.json", b'{ "a": [1.50, "b"] }').decode()
    '{"a":[1.5,"b"]}'
    """
    if not name.endswith(".json"):
        return data
    try:
        found = json.loads(data, object_pairs_hook=_Pairs)
        short = json.dumps(_plain_json(found), separators=(",", ":"), ensure_ascii=False).encode()
        same = json.loads(short, object_pairs_hook=_Pairs) == found
    except (ValueError, RecursionError):  # no JSON of ours: not ours to judge
        return data
    return short if same and len(short) < len(data) else data


class _Pairs(list[tuple[str, Any]]):
    """An object of JSON as its pairs, in which no key that comes twice is lost."""


def _plain_json(found: Any) -> Any:
    if isinstance(found, _Pairs):
        return {key: _plain_json(value) for key, value in found}
    return [_plain_json(value) for value in found] if isinstance(found, list) else found


def contents_of(model: Model, kind: Family, menu: Sequence[str] | None, *, pure: bool) -> tuple[Contents, list[str]]:
    """Return what may compete in a directory, and a line for every kind of matrix that cannot.

    Args:
        model: on any device.
        kind: whose directory it is.
        menu: schemes to choose from, all of the family's menu if None.
        pure: refuse matrices that no scheme of the menu can hold.

    Raises:
        CheckpointError: the model is of a kind that the format cannot hold.
        UsageError: a scheme is unknown, or `pure` and a matrix fits none.
    """
    if "tying.json" in model.files:
        raise CheckpointError(f"{model.name} shares layers by tying.json, which {kind.name} has no word for")
    stacked = next((u for u in model.units if u.stacked), None)
    if stacked is not None:
        raise CheckpointError(
            f"{model.name} keeps experts as one tensor ({stacked.name} {stacked.shape}), which is not written as "
            f"{kind.name} yet; --format gguf with --template can hold it"
        )
    float_type = "F16" if _mostly_half(model) else "BF16"
    plain = float_type.lower()
    names = _parse(menu, kind, plain)
    places: list[Place] = []
    types: dict[str, tuple[str, ...]] = {}
    why: dict[str, list[str]] = {}
    for unit in model.units:
        if len(unit.shape) != 2:
            continue
        reason = _unfit(unit, model, kind)
        rows, cols = unit.matrix_shape
        fits = () if reason else tuple(n for n in names if n != plain and kind.layout(n, cols, float_type))
        if not fits and not reason:
            others = [n for n in kind.schemes() if kind.layout(n, cols, float_type)]
            able = f"{', '.join(others)} can" if others else "no scheme of this format can; --format gguf may"
            reason = f"rows of {cols} columns, which none of {', '.join(names)} can hold; {able}"
        if reason:
            why.setdefault(reason, []).append(unit.name)
        else:
            places.append(Place(unit.name, unit.name, (rows, cols)))
            types[unit.name] = (*fits, plain) if plain in names else fits
    notes = [f"{found[0]}{f' and {len(found) - 1} more' if found[1:] else ''} kept in {plain}: {reason}"
             for reason, found in why.items()]  # fmt: skip
    refused = [n for n, reason in zip(notes, why, strict=True) if reason not in {_NO_TABLES, _NO_HEADS}]
    if pure and refused:
        raise UsageError(refused[0].replace(f" kept in {plain}", " cannot be quantized"))
    groups = shared_inputs(model) if kind.bound else {}
    return Contents(kind, model, float_type, tuple(places), types, groups), notes


def _mostly_half(model: Model) -> bool:
    counts = {k: sum(u.parameters for u in model.units if u.dtype == k) for k in ("F16", "BF16", "F32")}
    return counts["F16"] > max(counts["BF16"], counts["F32"])


def _parse(menu: Sequence[str] | None, kind: Family, plain: str) -> tuple[str, ...]:
    known = (*kind.schemes(), plain)
    names = tuple(n.strip().lower() for n in menu) if menu is not None else (*kind.menu(), plain)
    for n in names:
        if n not in known:
            raise UsageError(f"unknown {kind.name} scheme {n}: there are {', '.join(known)}")
    return tuple(dict.fromkeys(names))


def head_of(model: Model) -> Any:
    """Return the module of the output head, or None where the model names none."""
    return getattr(model.module, "get_output_embeddings", lambda: None)()


def _unfit(unit: Unit, model: Model, kind: Family) -> str:
    """Say why a matrix cannot be stored in any scheme; an empty text if it can."""
    module, sort = linear_weights(model.module).get(unit.name, (None, ""))
    if sort not in {"linear", "embedding"} or not unit.name.endswith("weight"):
        return f"{kind.name} quantizes weights of linear maps{' and embeddings' if kind.tables else ''} only"
    if sort == "embedding" and not kind.tables:
        return _NO_TABLES
    if module is head_of(model) and not kind.heads:
        return _NO_HEADS
    return ""


@torch.no_grad()
def shared_inputs(model: Model) -> dict[str, str]:
    """Group of every linear map that is given the same tensor as another one of its parent, by weight's name."""
    seen: list[tuple[str, torch.Tensor]] = []
    hooks = []
    linears = {id(m): n for n, (m, k) in linear_weights(model.module).items() if k == "linear"}

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            seen.append((linears[id(module)], args[0]))

    hooks += [m.register_forward_pre_hook(hook) for m in model.module.modules() if id(m) in linears]
    try:
        streamed = streaming.of(model.module)
        device = streamed.device if streamed else next(model.module.parameters()).device
        few = torch.zeros(1, _PROBE, dtype=torch.long, device=device)
        streaming.run(model.module, lambda module: module(few))
    finally:
        for h in hooks:
            h.remove()
    groups: dict[str, str] = {}
    for i, (name, given) in enumerate(seen):
        parent = name.rsplit(".", 2)[0]
        same = next((n for n, x in seen[:i] if x is given and n.rsplit(".", 2)[0] == parent and n != name), None)
        groups[name] = groups.get(same, same) if same is not None else groups.get(name, name)
    return groups


def read_units(kind: Family, directory: Path, units: Sequence[Unit]) -> Values:
    """Values of all units in stored layout, from a directory's files alone, each read whenever it is asked for.

    Raises:
        CheckpointError: the weights are damaged or incomplete.
    """
    tensors = read(directory / WEIGHTS)
    schemes = _schemes(kind, directory)
    by_name = {u.name: u for u in units}

    def base_of(name: str) -> str:
        return name.removesuffix(".weight")

    def make(name: str) -> npt.NDArray[Any]:
        unit, base = by_name[name], base_of(name)
        if base not in schemes:
            return tensors[name].array()
        return from_matrix(unit, _codes(kind, tensors, f"{base}.", schemes[base], unit.matrix_shape).values())

    lost = next((n for n in by_name if base_of(n) not in schemes and n not in tensors), None)
    if lost is not None:
        raise CheckpointError(f"{directory / WEIGHTS} lacks {lost}")
    return Lazy(list(by_name), make)


def _codes(
    kind: Family, tensors: Mapping[str, Tensor], base: str, scheme: str, shape: tuple[int, int]
) -> Codes:  # fmt: skip
    """A matrix of a file, whose tensors must have the shapes that its scheme asks for."""
    for float_type in _TYPES:
        form = kind.layout(scheme, shape[1], float_type)
        if form is None:
            break
        specs = kind.specs(form, *shape)
        if all((t := tensors.get(base + s.suffix)) and (t.dtype, t.shape) == (s.dtype, s.shape) for s in specs):
            return kind.codes(form, [tensors[base + s.suffix].array() for s in specs])
    raise CheckpointError(f"the tensors of {base[:-1]} are not what the scheme {scheme} asks for")


def _schemes(kind: Family, directory: Path) -> dict[str, str]:
    """Return the scheme of every module, as a directory's config says it.

    Raises:
        CheckpointError: it says none that the family has.
    """
    try:
        found = kind.read(read_config(directory))
        for scheme in found.values():
            kind.scheme(scheme)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as exc:
        raise CheckpointError(f"{directory / CONFIG} describes no scheme of {kind.name}: write it anew") from exc
    return found


def ledger_of(directory: Path) -> list[Entry]:
    """Owner and kind of every byte of a directory, whose family its `config.json` tells.

    Raises:
        CheckpointError: it is no model directory, or of no family here and without a file of weights.
    """
    config = read_config(directory)
    for name, key in (("mlx", "quantization"), ("compressed-tensors", "quantization_config")):
        if key in config:
            return ledger(family(name), directory)
    if (directory / WEIGHTS).is_file():  # a budget that holds everything as it is
        return ledger(family("compressed-tensors"), directory)
    raise CheckpointError(f"{directory} is quantized neither for MLX nor as compressed-tensors")


def ledger(kind: Family, directory: Path) -> list[Entry]:
    """Owner and kind of every byte of a directory."""
    tensors = read(directory / WEIGHTS)
    schemes = _schemes(kind, directory)
    entries, data = [], 0
    for t in tensors.values():
        base, _, suffix = t.name.rpartition(".")
        main = base not in schemes or (t.dtype in {"U32", "I32", "U8"} and "zero" not in suffix)
        parameters = 0
        if main:
            bits = kind.scheme(schemes[base]).bits if base in schemes else 0
            parameters = t.size * 8 // bits if bits else int(np.prod(t.shape))
        owner = f"{base} ({schemes[base]})" if base in schemes else f"{t.name} ({t.dtype})"
        entries.append(Entry(owner, "payload" if main else "side", t.size, parameters))
        data += t.size
    entries.append(Entry("(file)", "header", (directory / WEIGHTS).stat().st_size - data))
    for path in sorted(directory.iterdir()):
        if path.name != WEIGHTS:
            use = "tokenizer" if "token" in path.name or "chat" in path.name else "config"
            entries.append(Entry(f"({path.name})", use, path.stat().st_size))
    return entries
