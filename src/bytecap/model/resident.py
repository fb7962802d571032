"""Keep a model coded in memory: a block is decoded just before it runs and dropped behind it.

Weights that no block or module has at the moment are replaced by one value each that is not a number, so memory holds
the coded bytes, the part that runs, and the next part, which is decoded meanwhile on all cores. A part is a block of
the outermost `ModuleList` with most modules, or a module outside it. Small tensors stay decoded.

A GPU decodes matrices itself where triton is installed (`bytecap.model.device_decode`): coded bytes then lie on the
device, and what is left to the processor is still decoded ahead.

Every weight is what the decoder gives, so logits are those of the decoded model. Whether every weight is asked for by
the module that owns it shows in one pass over one token, which also decodes the whole file once.

What it leaves out: gradients and copies of the module. Moving it to another device or dtype is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.errors import BytecapError, UsageError
from bytecap.format.container import Contents, UnitSection
from bytecap.format.decoder import Units
from bytecap.format.entropy import jit
from bytecap.model.device_decode import Batch, DeviceUnits, on_processor, usable

_SMALL = 2**16  # values of a tensor that stays decoded


@dataclass(eq=False)
class _Part:
    """A group that is decoded together: (module, name of the parameter, its unit)."""

    places: list[tuple[nn.Module, str, UnitSection]] = field(default_factory=list)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # by unit
    following: _Part | None = None


@dataclass
class _Decoder:
    """Decode parts, the next one while the last one runs."""

    units: Units
    device: torch.device
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(jit.cores()))
    waiting: dict[_Part, dict[str, Future[Tensor]]] = field(default_factory=dict)
    there: DeviceUnits | None = None  # where the device decodes
    batches: dict[_Part, Batch] = field(default_factory=dict)
    last: _Part | None = None

    def tensor(self, section: UnitSection, dtype: torch.dtype) -> Tensor:
        """Return a unit's value on the device, floating-point values in a dtype."""
        return on_processor(self.units, section, self.device, dtype)

    def begin(self, part: _Part) -> None:
        """Let a part be decoded, if it is not."""
        if part not in self.waiting:
            sections = {s.unit.name: s for _, _, s in part.places}
            if self.there is not None:
                if part not in self.batches:
                    self.batches[part] = self.there.batch(list(sections.values()), part.dtypes)
                sections = {s.unit.name: s for s in self.batches[part].others}
            self.waiting[part] = {n: self.pool.submit(self.tensor, s, part.dtypes[n]) for n, s in sections.items()}

    def take(self, part: _Part) -> dict[str, Tensor]:
        """Return a part's values by unit, and let the part be decoded that followed it the last time."""
        self.begin(part)
        self.waiting = {part: self.waiting[part]}  # nothing else is kept, however the order has changed
        found = {name: future.result() for name, future in self.waiting.pop(part).items()}
        if self.there is not None:
            found |= self.batches[part].on_device()
            late = [s for s in self.batches[part].others if s.unit.name not in found]
            found |= {s.unit.name: self.tensor(s, part.dtypes[s.unit.name]) for s in late}
        if self.last is not None:
            self.last.following = part
        self.last = part
        if part.following is not None:
            self.begin(part.following)
        return found


def keep_coded(
    module: nn.Module,
    contents: Contents,
    *,
    device: torch.device,
    dtype: torch.dtype | None,
    name: str,
    prefix: str = "",
) -> None:
    """Let a module without values decode them whenever it runs.

    Args:
        module: from `bytecap.model.rebuilt.build`, its parameters on the `meta` device.
        contents: of the artifact, whose bytes are kept.
        device: where it runs, and decodes if it can.
        dtype: of its floating-point weights; None keeps that of every parameter and buffer.
        name: of the file, for messages.
        prefix: what units' names have in front of the module's own, where it is a part of the file's model.

    Raises:
        CorruptError: a section cannot be decoded. UsageError: a weight is read otherwise than by a call of the module
            that owns it.
    """
    there = DeviceUnits(contents, device) if usable(device) else None
    decoder = _Decoder(there.units if there else Units(contents), device, there=there)
    sections = {n.removeprefix(prefix): s for s in decoder.units.sections for n in (s.unit.name, *s.unit.aliases)}
    parts: dict[nn.Module, _Part] = {}
    chain = _longest_list(module)
    kept: dict[str, nn.Parameter] = {}
    for path, owner in module.named_modules():
        _put_buffers(owner, path, sections, decoder, dtype)
        for leaf, empty in list(owner.named_parameters(recurse=False)):
            section, kind = sections[f"{path}.{leaf}" if path else leaf], dtype or empty.dtype
            unit, small = section.unit.name, section.unit.parameters <= _SMALL
            if unit not in kept:
                fresh = decoder.tensor(section, kind) if small else _absent(empty, kind, device)
                kept[unit] = nn.Parameter(fresh, requires_grad=False)
            owner.register_parameter(leaf, kept[unit])
            if not small:
                part = parts.setdefault(_runner(module, path, chain), _Part())
                part.places.append((owner, leaf, section))
                part.dtypes[unit] = kind
    for runner, part in parts.items():
        _hook(runner, part, decoder, kept)
    _try(module, device, name)
    _stay(module, device, name)


def _longest_list(module: nn.Module) -> str:
    """Return the path of the `ModuleList` with most modules of those that lie in no other; empty if there is none."""
    lists = {p: len(m) for p, m in module.named_modules() if isinstance(m, nn.ModuleList)}
    outer = [p for p in lists if not any(p.startswith(f"{other}.") for other in lists)]
    return max(outer, key=lambda p: lists[p], default="")


def _runner(module: nn.Module, path: str, chain: str) -> nn.Module:
    """Return the module whose call needs the parameters of the module at a path: its block, or itself."""
    if chain and path.startswith(f"{chain}."):
        path = f"{chain}.{path.removeprefix(f'{chain}.').split('.')[0]}"
    return module.get_submodule(path)


def _absent(empty: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of a parameter's shape that takes the memory of one value, which is not a number."""
    return torch.full((1,), float("nan"), dtype=dtype, device=device).expand(empty.shape)


def _put_buffers(
    owner: nn.Module, path: str, sections: dict[str, UnitSection], decoder: _Decoder, dtype: torch.dtype | None
) -> None:
    """Put stored buffers in, and let the others follow to the device."""
    for leaf, buffer in list(owner.named_buffers(recurse=False)):
        section = sections.get(f"{path}.{leaf}" if path else leaf)
        owner._buffers[leaf] = (  # noqa: SLF001
            buffer.to(decoder.device) if section is None else decoder.tensor(section, dtype or buffer.dtype)
        )


def _hook(runner: nn.Module, part: _Part, decoder: _Decoder, kept: dict[str, nn.Parameter]) -> None:
    """Give a part its values in front of every call, and take them away behind it."""

    def before(*_: Any) -> None:
        fresh = {n: nn.Parameter(t, requires_grad=False) for n, t in decoder.take(part).items()}
        for owner, leaf, section in part.places:
            owner.register_parameter(leaf, fresh[section.unit.name])

    def behind(*_: Any) -> None:
        for owner, leaf, section in part.places:
            owner.register_parameter(leaf, kept[section.unit.name])

    runner.register_forward_pre_hook(before)
    runner.register_forward_hook(behind, always_call=True)


def _stay(module: Any, device: torch.device, name: str) -> None:
    """Refuse to move or convert a module: its weights would arrive as memory without values."""
    kinds = {p.dtype for p in module.parameters()}

    def refused(change: Any, *_: Any, **__: Any) -> Any:
        changed = [change(torch.empty(0, dtype=k, device=device)) for k in kinds]
        if {(t.device, t.dtype) for t in changed} != {(torch.empty(0, device=device).device, k) for k in kinds}:
            raise UsageError(f"{name} is coded for {device}: load it again for another device or dtype, or decoded")
        return module

    module._apply = refused  # noqa: SLF001


@torch.no_grad()
def _try(module: Any, device: torch.device, name: str) -> None:
    """Run one token through a module."""
    why: Sequence[Any] = ()
    try:
        found = module(torch.zeros(1, 1, dtype=torch.long, device=device))
        sound = bool(torch.isfinite(found[0] if not hasattr(found, "logits") else found.logits).all())
    except (RuntimeError, TypeError, AttributeError, ValueError) as exc:
        if isinstance(exc, BytecapError):
            raise
        sound, why = False, (exc,)
    if not sound:
        said = f" ({str(why[0]).splitlines()[0]})" if why else ""
        raise UsageError(
            f"{name} cannot be kept coded: its model reads weights otherwise than by calls of their modules{said}; "
            "load it decoded"
        )
