"""How well row energies of a tied table hold on other text, by the model's own predictions and by counts alone.

Steps of rows follow from the energies that are believed in, `step ~ believed^-1/2`. At high rate and equal bytes the
table's distortion on other text is then the mean of `true / believed` times the geometric mean of `believed`; true are
counts of held-out tokens for the lookup, and predicted frequencies there for the head, mixed by `--shares` of the
lookup. Printed and recorded are ratios to counts and half a token a row, which is what was believed in before ADR 20.

    python benchmarks/table_rows.py --models DIR --texts DIR --model smollm2 --tokens 131072 --predicted 12288
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from bytecap.calibration import metric
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.sources import encoder
from common import WORKLOADS, parser, record

WINDOW = 256


def windows(encode: Any, args: Any, kind: str, tokens: int) -> list[list[int]]:
    """Every other window of the three texts, so many tokens in all."""
    found: list[list[int]] = []
    for name in WORKLOADS:
        text = (args.texts / f"{name}.{kind}.txt").read_text("utf-8")[: 12 * tokens]
        ids, _ = next(encode([text]))
        starts = range(0, len(ids) - WINDOW, 2 * WINDOW)
        found += [ids[at : at + WINDOW] for at in itertools.islice(starts, max(1, tokens // 3 // WINDOW))]
    return found


def counted(parts: list[list[int]], rows: int) -> Tensor:
    """Occurrences of every token."""
    return torch.bincount(torch.tensor(parts).reshape(-1), minlength=rows).double()


@torch.no_grad()
def predicted(module: Any, parts: list[list[int]]) -> Tensor:
    """Sum of predicted probabilities of every token."""
    return torch.stack([module(torch.tensor([p])).logits[0].softmax(-1).double().sum(0) for p in parts]).sum(0)


def distortion(believed: Tensor, true: Tensor) -> float:
    """Relative distortion at equal bytes and high rate."""
    believed, true = believed / believed.mean(), true / true.mean()
    return float((true / believed).mean() * torch.exp(torch.log(believed).mean()))


def mixed(lookup: Tensor, head: Tensor, share: float) -> Tensor:
    """Energies of both uses, each with its share."""
    return share * lookup / lookup.sum() + (1 - share) * head / head.sum()


def main() -> None:
    """Measure every power and prior at every share."""
    p = parser(__doc__.split("\n")[0], models="smollm2")
    p.add_argument("--predicted", type=int, default=12_288, help="calibration tokens behind the predictions")
    p.add_argument("--powers", nargs="*", type=float, default=[0.4, 0.6, 0.8, 1.0])
    p.add_argument("--priors", nargs="*", type=float, default=[5.0, 20.0, 80.0])
    p.add_argument("--shares", nargs="*", type=float, default=[0.3, 0.5, 0.7])
    args = p.parse_args()
    for name in args.model:
        model = load_checkpoint(args.models / name)
        encode, rows = encoder(model.files), model.module.config.vocab_size
        seen = counted(windows(encode, args, "calib", args.tokens), rows)
        head = predicted(model.module, windows(encode, args, "calib", args.predicted))
        head *= seen.sum() / head.sum()
        held = windows(encode, args, "val", args.eval_tokens)
        true = counted(held, rows), predicted(model.module, held[:: max(1, len(held) // 24)])
        for share in args.shares:
            goal = mixed(*true, share)
            half = metric._UNSEEN_TOKENS  # noqa: SLF001
            base = distortion(mixed(seen + half, head + half, share), goal)
            for power, prior in itertools.product(args.powers, args.priors):
                metric._PRIOR = prior  # noqa: SLF001
                lookup = metric._believed(seen, head**power * seen.sum() / (head**power).sum())  # noqa: SLF001
                floor = metric._PREDICTED_TOKENS  # noqa: SLF001
                ratio = distortion(mixed(lookup + floor, head + floor, share), goal) / base
                row = {"benchmark": "table_rows", "model": name, "share": share, "power": power, "prior": prior}
                record(args, {**row, "tokens": int(seen.sum()), "held_tokens": int(true[0].sum()), "ratio": ratio})
                print(f"{name} share {share} power {power} prior {prior}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
