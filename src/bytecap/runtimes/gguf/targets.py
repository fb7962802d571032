"""Aim tensors of blocks at the original's outputs, from the inputs that the coded tensors in front of them deliver.

A tensor's bytes follow from its type alone, so nothing has to be rounded again behind the walk
(`bytecap.allocation.asymmetric_targets`): what it codes is what is written, where that lowers the KL on the correction
tokens. Tensors whose output is added to a residual stream also make up for what that lacks. Tensors whose unit is read
more than once, or stored in part, stay as they are. A streamed model is walked block by block, to the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from bytecap.allocation.asymmetric_targets import order_of, walk_stages
from bytecap.allocation.shared_inputs import LostError
from bytecap.allocation.streamed_targets import walk_streamed
from bytecap.allocation.target_fit import Moments, trial_rows
from bytecap.job import Job
from bytecap.model import streaming
from bytecap.model.evaluation import by_window
from bytecap.model.forward import pass_tokens
from bytecap.model.quantized_copy import Values, copy_of, load_values
from bytecap.model.streamed_checkpoint import StreamedModel
from bytecap.model.texts import leading
from bytecap.model.uncertainty import surely_worse
from bytecap.runtimes.gguf.menu import Item
from bytecap.runtimes.gguf.rounding import Coding, Rounded, round_all
from bytecap.runtimes.gguf.solve import Found, keep_of, rounded_values
from bytecap.types import Unit, as_matrix

TOKENS = 16_384  # that a walk sees


def follow_prefix(job: Job, items: Sequence[Item], coding: Coding, found: Found) -> Found:
    """Return the plan with its tensors coded anew along a walk; as it was where that surely raises the KL.

    Args:
        job: tokens to walk, and others to decide by.
        items: tensors that compete.
        coding: the family of formats.
        found: the plan.
    """
    model, members = job.model, members_of(job.model.units, items)
    units = [u for u in model.units if u.name in members]
    windows = leading(job.sets.statistics, TOKENS)
    order = order_of(units, model.module, windows, job.device)
    quantized_copy, rounded = copy_of(model.module), dict(found.rounded)
    staged = {n for names in order for n in names}
    rest = [i.place.name for i in items if i.place.unit not in staged]
    load_values(quantized_copy, rounded_values(model, items, {n: rounded[n] for n in rest}))
    matrices = {u.name: u for u in units}

    def stage(names: Sequence[str], inputs: Moments, *_: int) -> Values:
        weights = {n: as_matrix(matrices[n], model.tensor(matrices[n]).detach()).float() for n in names}
        fit = inputs.fit([trial_rows(w, row_weights(members[n])) for n, w in weights.items()], 1.0)
        aimed = {n: w + w @ (fit.fix * fit.strength) for n, w in weights.items()}
        if fit.stream is not None:
            aimed = {n: w + fit.stream for n, w in aimed.items()}
        moved = [moved_to(i, w) for n, w in aimed.items() for i in members[n]]
        coded = round_all(coding, moved, found.settings, lambda _: None, keep_of(model))
        rounded.update(coded)
        return rounded_values(model, moved, coded)

    with job.reporter.step("targets", 1) as advance:
        try:
            tokens = pass_tokens(model.module, torch.device("cpu"))  # waiting passes are many
            if isinstance(model, StreamedModel):
                lane = streaming.of(quantized_copy)
                assert lane is not None  # noqa: S101 (the copy of a streamed model is streamed)
                walk_streamed(
                    order, model.streamed, lane, windows, stage, tokens=tokens, scratch=model.scratch, advance=advance
                )  # fmt: skip
            else:
                walk_stages(
                    order, model.module, quantized_copy, windows, stage, tokens=tokens, device=job.device,
                    advance=advance, streams=True,
                )  # fmt: skip
        except LostError:
            job.reporter.note("the order in which modules are called depends on the data: no targets")
            return found
    return _better(job, items, found, rounded)


def _better(job: Job, items: Sequence[Item], found: Found, rounded: Mapping[str, Rounded]) -> Found:
    """Return the plan with other codes unless these surely have the higher KL on the correction tokens."""
    variants = {
        label: rounded_values(job.model, items, codes)
        for label, codes in (("before", found.rounded), ("after", rounded))
    }
    original, windows = job.model.module, job.sets.correction
    scores = by_window(original, copy_of(original), variants, windows, device=job.device)
    before, after = scores["before"], scores["after"]
    if surely_worse(before.kl, after.kl, after.tokens):
        job.reporter.note("targets that follow the coded prefix raise the KL on the correction tokens: left out")
        return found
    return replace(found, rounded=dict(rounded), predicted=float(after.kl.sum() / after.tokens.sum()))


def members_of(units: Sequence[Unit], items: Sequence[Item]) -> dict[str, list[Item]]:
    """Return the tensors of every unit all of whose rows are in some, by name."""
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.place.unit, []).append(item)
    rows = {u.name: u.matrix_shape[0] for u in units if u.name in found}
    return {n: found[n] for n, count in rows.items() if sum(i.shape[0] for i in found[n]) == count}


def row_weights(members: Sequence[Item]) -> torch.Tensor:
    """Return the weight (rows,) of every row's error, in the unit's order."""
    found = np.empty(sum(i.shape[0] for i in members))
    for i in members:
        metric = i.metric
        rows = (metric.rows * metric.hessian.diagonal().mean().cpu()).cpu().numpy()
        found[slice(None) if i.place.rows is None else i.place.rows] = rows
    return torch.from_numpy(found)


def moved_to(item: Item, matrix: torch.Tensor) -> Item:
    """Return the tensor with the values that a unit's matrix (rows, cols) gives it."""
    weight = np.ascontiguousarray(item.place.to_file(matrix.cpu().numpy()), np.float32)
    return Item(item.place, weight, item.metric, item.held, item.types, item.shrinkage, item.device, item.spans)
