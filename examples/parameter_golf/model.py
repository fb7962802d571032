"""The challenge's baseline transformer and a looped one, in plain PyTorch.

Width 512, 9 blocks, 8 query and 4 key-value heads, rotary positions, RMS norms without weights, squared-ReLU MLPs of
twice the width, tied vocabulary of 1,024, logits capped softly at 30. The first half of the block uses hands its
outputs to the second half over learnt skips, last to first; every use also mixes the normed embedding back in.
Parameters carry the challenge's public names; `baseline()` has 17,059,912 of them.

A looped model uses some stored blocks several times. The uses share every parameter of the block; `use_gains` holds
what each single use has of its own: a gain per channel for its attention and its MLP output.

Factories for `bytecap fit --factory model.py:NAME`: `baseline`, `looped`, `mini`, `mini_looped`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (the usual name)

SOFTCAP = 30.0
ROTARY_BASE = 10_000.0


def rms_norm(x: Tensor) -> Tensor:
    """Norm over the last axis, no weights."""
    return F.rms_norm(x, (x.shape[-1],))


def rotate(x: Tensor) -> Tensor:
    """Rotary position encoding of (batch, heads, length, head width): channel i turns with channel i + half."""
    half = x.shape[-1] // 2
    speed = ROTARY_BASE ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.outer(torch.arange(x.shape[-2], device=x.device, dtype=torch.float32), speed)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Attention(nn.Module):
    """Causal attention with fewer key-value heads than query heads; queries and keys are normed."""

    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = heads, kv_heads, width // heads
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.c_v = nn.Linear(width, kv_heads * self.head_width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.q_gain = nn.Parameter(torch.full((heads,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        batch, length, width = x.shape
        q = self.c_q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        k = self.c_k(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        v = self.c_v(x).view(batch, length, self.kv_heads, -1).transpose(1, 2)
        q = rotate(rms_norm(q)) * self.q_gain.to(q.dtype)[:, None, None]
        y = F.scaled_dot_product_attention(q, rotate(rms_norm(k)), v, is_causal=True, enable_gqa=True)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    """Squared ReLU between two matrices."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.fc = nn.Linear(width, factor * width, bias=False)
        self.proj = nn.Linear(factor * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same."""
        return self.proj(F.relu(self.fc(x)).square())


class Block(nn.Module):
    """Attention and MLP around a residual stream that takes the embedding in again."""

    def __init__(self, width: int, heads: int, kv_heads: int, factor: int) -> None:
        super().__init__()
        self.attn, self.mlp = Attention(width, heads, kv_heads), MLP(width, factor)
        self.attn_scale = nn.Parameter(torch.ones(width))
        self.mlp_scale = nn.Parameter(torch.ones(width))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(width), torch.zeros(width))))

    def forward(self, x: Tensor, first: Tensor, gains: Tensor | None = None) -> Tensor:
        """One use of the block.

        Args:
            x: residual stream, (batch, length, width).
            first: normed embedding, same shape.
            gains: (2, width) on the two outputs, the use's own.
        """
        attn_scale, mlp_scale = self.attn_scale, self.mlp_scale
        if gains is not None:
            attn_scale, mlp_scale = attn_scale * gains[0], mlp_scale * gains[1]
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * first
        x = x + attn_scale.to(x.dtype) * self.attn(rms_norm(x))
        return x + mlp_scale.to(x.dtype) * self.mlp(rms_norm(x))


class Golf(nn.Module):
    """Decoder-only transformer; see the module's docstring.

    Args:
        width: of the residual stream.
        blocks: number of stored blocks.
        heads: query heads.
        kv_heads: key and value heads.
        factor: MLP width over `width`.
        vocabulary: tokens, embedding and head tied.
        uses: stored block of every use in running order; by default every block once.
    """

    def __init__(
        self,
        width: int = 512,
        blocks: int = 9,
        heads: int = 8,
        kv_heads: int = 4,
        factor: int = 2,
        vocabulary: int = 1024,
        uses: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.uses = tuple(range(blocks)) if uses is None else tuple(uses)
        self.tok_emb = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width, heads, kv_heads, factor) for _ in range(blocks))
        self.skip_weights = nn.Parameter(torch.ones(len(self.uses) // 2, width))
        shared = [u for u, b in enumerate(self.uses) if self.uses.count(b) > 1]
        self._gain_row = {use: row for row, use in enumerate(shared)}
        if shared:
            self.use_gains = nn.Parameter(torch.ones(len(shared), 2, width))
        self.reset()

    def reset(self) -> None:
        """Start values: small embedding, output projections at zero, so that blocks begin as identities."""
        nn.init.normal_(self.tok_emb.weight, std=0.005)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("proj"):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.orthogonal_(module.weight)

    def forward(self, ids: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits of the next tokens, or their mean loss.

        Args:
            ids: (batch, length) integers.
            targets: same shape, the next tokens.

        Returns:
            Without targets float32 logits (batch, length, vocabulary), else the mean cross-entropy in nats, a scalar.
        """
        x = first = rms_norm(self.tok_emb(ids))
        kept: list[Tensor] = []
        half = len(self.uses) // 2
        for use, number in enumerate(self.uses):
            if use >= half and kept:
                x = x + self.skip_weights[use - half].to(x.dtype) * kept.pop()
            row = self._gain_row.get(use)
            x = self.blocks[number](x, first, None if row is None else self.use_gains[row])
            if use < half:
                kept.append(x)
        logits = F.linear(rms_norm(x), self.tok_emb.weight).float()
        logits = SOFTCAP * torch.tanh(logits / SOFTCAP)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long())


def baseline() -> Golf:
    """The challenge's baseline: 17,059,912 parameters."""
    return Golf()


def looped() -> Golf:
    """The same stored blocks with the middle three used twice, as records did: 17,067,080 parameters, 12 uses."""
    return Golf(uses=(0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8))


def mini() -> Golf:
    """For a CPU: 4 blocks of width 128, 592,144 parameters."""
    return Golf(width=128, blocks=4, heads=4, kv_heads=2)


def mini_looped() -> Golf:
    """`mini` with its middle two blocks used twice."""
    return Golf(width=128, blocks=4, heads=4, kv_heads=2, uses=(0, 1, 2, 1, 2, 3))
