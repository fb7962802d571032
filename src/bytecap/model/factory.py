"""Models from a user's own source file: `FILE.py:CALLABLE` builds the module, a state dict fills it.

This is the one place where bytecap runs code it is given: the file named with `--factory` or `--loss`, by the user, on
the command line. Nothing from an artifact or a checkpoint is ever run: checkpoints are safetensors, or what
`torch.load(weights_only=True)` accepts.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import CheckpointError, UsageError
from bytecap.model.checkpoint import DTYPES, Model, tensors_of
from bytecap.model.fileset import check_safetensors
from bytecap.model.from_artifact import load_into
from bytecap.model.module import model_of
from bytecap.model.wrappers import plain_names

_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_callable(spec: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The callable of `FILE.py:NAME` or `FILE.py:NAME(key=literal, ...)`, and the arguments given there. Runs the file.

    Raises:
        UsageError: the file is missing, fails, or holds no such callable.
    """
    file, _, rest = spec.rpartition(":")
    name, arguments = _arguments(rest, spec)
    path = Path(file)
    if not file or not path.is_file():
        raise UsageError(f"cannot read {file or spec!r}: give FILE.py:CALLABLE with an existing file")
    found = importlib.util.spec_from_file_location(f"bytecap_user_{path.stem}", path)
    if found is None or found.loader is None:
        raise UsageError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[found.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        found.loader.exec_module(module)
    except (Exception, SystemExit) as exc:
        raise UsageError(f"{path} raised {type(exc).__name__} when it was run: {exc}") from exc
    finally:
        sys.path.remove(str(path.resolve().parent))
    target = getattr(module, name, None)
    if not callable(target):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == found.name]
        near = difflib.get_close_matches(name, known, 1)
        raise UsageError(f"{path} holds no callable {name!r}" + (f", did you mean {near[0]}?" if near else ""))
    return target, arguments


def _arguments(call: str, spec: str) -> tuple[str, dict[str, Any]]:
    """Name and keyword arguments of `NAME` or `NAME(key=literal)`."""
    try:
        parsed = ast.parse(call.strip(), mode="eval").body
        if isinstance(parsed, ast.Name):
            return parsed.id, {}
        if isinstance(parsed, ast.Call) and isinstance(parsed.func, ast.Name) and not parsed.args:
            return parsed.func.id, {str(k.arg): ast.literal_eval(k.value) for k in parsed.keywords if k.arg}
    except (SyntaxError, ValueError):
        pass
    raise UsageError(
        f"cannot read {spec!r}: use FILE.py:CALLABLE or FILE.py:CALLABLE(key=value), values being literals"
    )


def make_module(spec: str) -> nn.Module:
    """The module a factory returns.

    Raises:
        UsageError: the factory fails or returns something else.
    """
    factory, arguments = load_callable(spec)
    try:
        module = factory(**arguments)
    except (Exception, SystemExit) as exc:
        raise UsageError(f"the factory {spec} raised {type(exc).__name__}: {exc}") from exc
    if not isinstance(module, nn.Module):
        raise UsageError(f"the factory {spec} returned {type(module).__name__}, not a torch module")
    return module


def read_state(path: Path) -> dict[str, Tensor]:
    """A state dict from safetensors or `torch.save`; no code in it is run.

    Raises:
        CheckpointError: unreadable, damaged, or holding pickled objects.
    """
    if not path.is_file():
        raise CheckpointError(f"cannot read the checkpoint {path}: there is no such file")
    if path.suffix == ".safetensors":
        check_safetensors(path)
        from safetensors.torch import load_file

        return load_file(path)
    import pickle  # for its error alone

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is an error
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as exc:
        raise CheckpointError(
            f"{path} holds pickled objects{_named(exc)}, which can run code, or is no checkpoint; it is refused: save "
            "`module.state_dict()` alone"
        ) from exc
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as exc:
        why = f"nothing that torch.save wrote ({type(exc).__name__}: {str(exc).strip().split(chr(10), 1)[0][:160]})"
        raise CheckpointError(f"{path} is no readable checkpoint: {why}") from exc
    return _state(found, path)


def _named(exc: Exception) -> str:
    """The class that torch refused, from its message."""
    found = re.search(r"GLOBAL (\S+)", str(exc))
    return f" ({found[1]})" if found else ""


def _state(found: Any, path: Path) -> dict[str, Tensor]:
    """The dictionary of tensors in what was loaded, without what wrappers put in front of names."""
    for key in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path} holds no state dict")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{path} holds no state dict: {name!r} is {type(value).__name__}, not a tensor")
    plain = plain_names(found)
    return {plain[n]: t for n, t in found.items()}


def fill(module: nn.Module, state: Mapping[str, Tensor], path: Path | str) -> None:
    """Load a state dict into a module; tied names may be left out.

    Raises:
        CheckpointError: names or shapes differ; both lists, and the nearest names in pairs.
    """
    state = {p: state[n] for n, p in plain_names(state).items()}
    live = tensors_of(module)
    live = {p: live[n] for n, p in plain_names(live).items()}
    known = {live[n].data_ptr() for n in state if n in live and live[n].numel()}
    missing = [n for n, t in live.items() if n not in state and not (t.numel() and t.data_ptr() in known)]
    extra = [n for n in state if n not in live]
    shapes = [
        f"{n} {list(live[n].shape)} against {list(t.shape)}"
        for n, t in state.items()
        if n in live and live[n].shape != t.shape
    ]
    if missing or extra or shapes:
        pairs = [f"{a} ~ {b}" for a, b in _nearest(missing, extra)]
        parts = [
            f"only in the module: {', '.join(missing)}" if missing else "",
            f"only in the checkpoint: {', '.join(extra)}" if extra else "",
            f"nearest names: {', '.join(pairs)}" if pairs else "",
            f"shapes in the module against the checkpoint: {', '.join(shapes)}" if shapes else "",
        ]
        raise CheckpointError(f"the module and {path} differ; " + "; ".join(p for p in parts if p))
    with torch.no_grad():
        for n, t in state.items():
            live[n].copy_(t)


def _nearest(names: Sequence[str], others: Sequence[str]) -> list[tuple[str, str]]:
    """Names that are alike, each in one pair at most, the most alike first.

    >>> _nearest(["blocks.weight", "blocks.bias", "gain"], ["block.weight", "zzz"])
    [('blocks.weight', 'block.weight')]
    """
    likeness = {(a, b): difflib.SequenceMatcher(None, a, b).ratio() for a in names for b in others}
    found: list[tuple[str, str]] = []
    for (a, b), share in sorted(likeness.items(), key=lambda item: -item[1]):
        if share >= 0.5 and not any(a == x or b == y for x, y in found):
            found.append((a, b))
    return found


def load_factory(spec: str, state: Path | None) -> Model:
    """The model of a factory filled from a checkpoint, or from an artifact (`.bcap`); as it is without either.

    Raises:
        UsageError, CheckpointError, ArtifactError: see `make_module`, `read_state`, `fill`, `bytecap.load_into`.
    """
    module = make_module(spec)
    if state is None:
        return model_of(module, spec)
    if state.suffix == ".bcap":
        load_into(state, module.float())
        return model_of(module, str(state))
    found = read_state(state)
    fill(module, found, state)
    model = model_of(module, str(state))
    dtypes = {n: DTYPES.get(str(t.dtype), "F32") for n, t in found.items()}
    plain = plain_names(u.name for u in model.units)
    units = tuple(replace(u, dtype=_narrower(dtypes.get(plain[u.name], u.dtype), u.dtype)) for u in model.units)
    return Model(model.module, units, model.files, model.name)


def _narrower(source: str, live: str) -> str:
    """The checkpoint's float dtype where the module holds its values widened; else the module's."""
    return source if live == "F32" and source in {"F16", "BF16"} else live
