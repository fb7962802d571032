"""The script that is handed in: it trains, and it scores `model.bcap` beside it.

    python train_gpt.py --factory baseline --data DIR             # bits per byte of model.bcap
    python train_gpt.py train --factory baseline --data DIR -o baseline.pt     # train.py's command line

`bytecap golf export` packs it with the modules it imports.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

import model as models
import train
from bytecap import load
from evaluate import evaluate, held_out


def main() -> None:
    """Command line."""
    if sys.argv[1:2] == ["train"]:
        del sys.argv[1]
        train.main()
        return
    parser = argparse.ArgumentParser(description="Bits per byte of model.bcap on the held-out shards.")
    parser.add_argument("--factory", default="baseline", help="function of model.py")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=Path("model.bcap"))
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    module = getattr(models, args.factory)()
    module.load_state_dict({name: torch.from_numpy(values.copy()) for name, values in load(str(args.model)).items()})
    score = evaluate(module.to(args.device).eval(), *held_out(args.data), args.length)
    print(f"val_loss:{score['loss']:.8f} val_bpb:{score['bits_per_byte']:.8f}")


if __name__ == "__main__":
    main()
