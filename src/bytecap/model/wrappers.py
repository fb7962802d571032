"""Names of tensors without what wrappers put into them: torch.compile, data-parallel training, checkpointing.

A wrapper around the whole module puts a prefix in front of every name; wrappers around its blocks put theirs in the
middle. A file written from a wrapped module fits the plain one, and the other way round.

>>> plain_names(["_orig_mod.blocks.0._fsdp_wrapped_module.weight", "_orig_mod.head"])
{'_orig_mod.blocks.0._fsdp_wrapped_module.weight': 'blocks.0.weight', '_orig_mod.head': 'head'}
"""

from __future__ import annotations

from collections.abc import Iterable

_ANYWHERE = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_IN_FRONT = "module."


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Every name's plain form; the names themselves where two of them would become one."""
    names = list(names)
    found = {n: ".".join(p for p in n.split(".") if p not in _ANYWHERE) for n in names}
    while found and all(p.startswith(_IN_FRONT) and p != _IN_FRONT for p in found.values()):
        found = {n: p.removeprefix(_IN_FRONT) for n, p in found.items()}
    return found if len(set(found.values())) == len(found) else {n: n for n in names}
