"""Measure what feedback between rows and damping between columns are worth, before anything is rounded.

With G the second moment of a linear map's output gradients (tokens weighted by their input energy) and H that of its
inputs (weighted by gradient energy), feedback along an axis gains -log2 det corr / 2m bits a weight at high rate. A
moment of few tokens promises too much, so one half of the tokens designs the feedback, with a ridge of `damp` on the
unit diagonal, and the other half prices it::

    (C_a + damp I) / (1 + damp) = L L^T        gain = -mean log2 L_ii - log2(tr(L^-1 C_b L^-T) / m) / 2

`in` is the promise of all tokens, `out` what the other half grants, both against the diagonal alone. Lines of the side
`columns` say which damping of the input Hessian suits so many tokens.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from bytecap.calibration.probe import fisher_loss
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.forward import batches
from bytecap.model.sources import load_sets
from bytecap.model.texts import leading
from bytecap.progress import Silent
from common import parser, record, texts

DAMPINGS = (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)
Halves = dict[tuple[str, str], list[Any]]  # summed moments of both halves, by side and map


def correlation(moment: Tensor, damp: float = 0.0) -> Tensor:
    """A moment scaled to a unit diagonal, with a ridge."""
    scale = moment.diagonal().clamp_min(1e-30).rsqrt()
    scaled = moment * scale[:, None] * scale[None, :]
    return (scaled + damp * torch.eye(len(scaled), dtype=moment.dtype)) / (1 + damp)


def promised(moment: Tensor, damp: float) -> float:
    """Bits that feedback gains by the moment it was designed on."""
    lower = torch.linalg.cholesky(correlation(moment, damp + 1e-9))
    return -float(torch.log2(lower.diagonal()).mean())


def granted(design: Tensor, price: Tensor, damp: float) -> float:
    """Bits that it gains by another one."""
    lower = torch.linalg.cholesky(correlation(design, damp + 1e-9))
    once = torch.linalg.solve_triangular(lower, correlation(price), upper=False)
    noise = torch.linalg.solve_triangular(lower, once.T.contiguous(), upper=False).diagonal().mean()
    return float(-torch.log2(lower.diagonal()).mean() - torch.log2(noise) / 2)


class Watch:
    """Hooks that add up both moments of every linear map, in turn for one half of the batches and the other."""

    def __init__(self, module: nn.Module, largest: int) -> None:
        self.sums: Halves = defaultdict(lambda: [0.0, 0.0])
        self.weights: dict[str, int] = {}
        self.half = 0
        for name, linear in module.named_modules():
            if isinstance(linear, nn.Linear) and linear.out_features <= largest:
                self.weights[name] = linear.weight.numel()
                linear.register_forward_hook(lambda _m, args, out, name=name: self.seen(name, args[0], out))

    def seen(self, name: str, inputs: Tensor, output: Tensor) -> None:
        """Wait for the gradient of a call."""
        x = inputs.detach().flatten(0, -2).float()

        def back(gradient: Tensor) -> None:
            g = gradient.flatten(0, -2).float()
            self.sums["rows", name][self.half] += (g.T @ (g * x.square().sum(1, keepdim=True))).double().cpu()
            self.sums["columns", name][self.half] += (x.T @ (x * g.square().sum(1, keepdim=True))).double().cpu()

        output.register_hook(back)


def measure(args: Any, name: str) -> Watch:
    """Run the pass over a model's calibration tokens."""
    model = load_checkpoint(args.models / name)
    sets = load_sets(model, texts(args.texts, "calib"), texts(args.texts, "val"), tokens=args.tokens,
                     evaluation_tokens=1, correction_tokens=1, seed=args.seed, reporter=Silent())  # fmt: skip
    module = model.module.to(args.device if args.device != "auto" else "cpu").requires_grad_(False)
    device = next(module.parameters()).device
    module.get_input_embeddings().register_forward_hook(lambda _m, _a, out: out.requires_grad_())
    watch, generator = Watch(module, args.largest), torch.Generator(device).manual_seed(args.seed)
    for i, (ids, mask) in enumerate(batches(leading(sets.statistics, args.tokens), 1)):
        watch.half = i % 2
        fisher_loss(module, ids.to(device), mask.to(device), generator).backward()
    return watch


def main() -> None:
    """Measure and print, one line a side and role."""
    p = parser(__doc__ or "")
    p.add_argument("--largest", type=int, default=4096, help="leave out linear maps of more rows")
    args = p.parse_args()
    for name in args.model:
        watch = measure(args, name)
        roles = defaultdict(list)
        for (side, unit), halves in watch.sums.items():
            roles[side, unit.split(".")[-1]].append((unit, *halves))
        for (side, role), found in roles.items():
            count = len(found)
            share = sum(watch.weights[u] for u, *_ in found) / sum(watch.weights.values())
            row: dict[str, Any] = {"in": {}, "out": {}}
            for damp in DAMPINGS:
                row["in"][damp] = sum(promised(a + b, damp) for _, a, b in found) / count
                row["out"][damp] = sum(granted(a, b, damp) + granted(b, a, damp) for _, a, b in found) / 2 / count
            base = {"benchmark": "two-sided", "model": name, "side": side, "role": role, "units": count}
            record(args, {**base, "share_of_weights": share, "tokens": args.tokens, **row})
            shown = "  ".join(f"{damp:g}: {row['out'][damp]:+.3f}" for damp in DAMPINGS)
            print(f"{name} {side:8s} {role:12s} {share:.3f} of weights, granted by damping  {shown}", flush=True)


if __name__ == "__main__":
    main()
