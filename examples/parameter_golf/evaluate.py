"""Bits per byte of a model on held-out shards, as the challenge scores it.

    python evaluate.py --factory baseline --state baseline.pt --data DIR

    bits per byte = nats per token / ln 2 * tokens / bytes

where bytes are those of the text that the predicted tokens stand for, so tokenizers compare fairly.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece
import torch
from torch import nn

import data
import model as models

Table = tuple[npt.NDArray[np.int64], ...]


@torch.inference_mode()
def evaluate(
    model: nn.Module, tokens: data.Tokens, table: Table, length: int = 1024, batch: int = 32
) -> dict[str, float | int]:
    """Score every token but the first in windows of `length` that do not overlap, in float32.

    Args:
        model: `model(ids, targets)` is the mean loss in nats.
        tokens: the held-out stream.
        table: from `data.byte_table`.
        length: tokens of context at most.
        batch: windows at once.

    Returns:
        `bits_per_byte`, `loss` (nats per token), `tokens` and `bytes`.
    """
    device = next(model.parameters()).device
    stream = torch.from_numpy(tokens.astype(np.int64))
    windows = (len(stream) - 1) // length
    x, y = (stream[at : at + windows * length].view(windows, length) for at in (0, 1))
    pairs = list(zip(x.split(batch), y.split(batch), strict=True)) if windows else []
    rest = stream[windows * length :]
    if len(rest) > 1:
        pairs.append((rest[None, :-1], rest[None, 1:]))
    nats = sum(model(a.to(device), b.to(device)).double().item() * b.numel() for a, b in pairs)
    count, size = len(stream) - 1, data.count_bytes(tokens, table)
    loss = nats / count
    return {"bits_per_byte": loss / math.log(2) * count / size, "loss": loss, "tokens": count, "bytes": size}


def held_out(directory: Path) -> tuple[data.Tokens, Table]:
    """Validation tokens and byte table of a folder that data.py wrote."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    return data.read_shards(directory, "val"), data.byte_table(tokenizer)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Bits per byte on the held-out shards.")
    parser.add_argument("--factory", required=True, help="function of model.py")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    module = getattr(models, args.factory)()
    module.load_state_dict(torch.load(args.state, weights_only=True))
    print(json.dumps(evaluate(module.to(args.device).eval(), *held_out(args.data), args.length)))


if __name__ == "__main__":
    main()
