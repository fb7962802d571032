"""Random checkpoints in quantized form, with the values that they stand for computed by formula."""

import json
import shutil

import torch
import transformers
from safetensors.torch import load_file, save_file

from bytecap.model.checkpoint import load_checkpoint
from conftest import build, save

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
QUANTIZED = "quantization_config"


def blocks_of(shape, side, grid):
    """The scale of every weight, by rows and columns of blocks."""
    rows = torch.arange(shape[-2]) // side[0]
    cols = torch.arange(shape[-1]) // side[1]
    return grid[..., rows, :][..., cols]


def float8(weight, side=(16, 24), scale=torch.float32):
    """Codes, scales and values of a matrix in blocks, the last of which are cut off."""
    grid = torch.zeros(*weight.shape[:-2], *(-(-n // s) for n, s in zip(weight.shape[-2:], side, strict=True)))
    grid = (torch.rand_like(grid) + 0.5) * 2e-3
    if scale == torch.float8_e8m0fnu:
        grid = torch.exp2(torch.randint(-12, -6, grid.shape).float())
    grid = grid.to(scale)
    each = blocks_of(weight.shape, side, grid.float())
    codes = (weight / each).clamp(-440, 440).to(torch.float8_e4m3fn)
    return codes, grid, codes.float() * each


def integers(weight, bits, group, zeros):
    """Codes around zero, scales, zero points and values."""
    top = 2 ** (bits - 1)
    scale = (weight.reshape(len(weight), -1, group).abs().amax(-1) / top).clamp(min=1e-4).to(torch.bfloat16)
    zero = torch.randint(-2, 3, scale.shape) if zeros else torch.zeros(scale.shape, dtype=torch.int64)
    wide, offset = scale.float().repeat_interleave(group, 1), zero.repeat_interleave(group, 1)
    codes = (weight / wide + offset).round().clamp(-top, top - 1).to(torch.int64)
    return codes, scale, zero, (codes - offset).float() * wide


def words(codes, bits):
    """Codes of rows in words of 32 bits, the lowest bits first, one by one in Python's integers."""
    each = 32 // bits
    out = torch.zeros(len(codes), -(-codes.shape[1] // each), dtype=torch.int64)
    for i, row in enumerate((codes + 2 ** (bits - 1)).tolist()):
        for j, code in enumerate(row):
            out[i, j // each] |= code << (bits * (j % each))
    return torch.where(out >= 2**31, out - 2**32, out).to(torch.int32)


def dense_words(codes, bits):
    """The same without gaps: one large integer a row, of which words of 32 bits are cut off."""
    out = []
    for row in (codes + 2 ** (bits - 1)).tolist():
        whole = sum(code << (bits * i) for i, code in enumerate(row))
        out.append([whole >> (32 * k) & 0xFFFFFFFF for k in range(-(-len(row) * bits // 32))])
    found = torch.tensor(out)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


class Checkpoint:
    """A random model with the tensors that its quantized twin stores, and the values these stand for."""

    def __init__(self, directory, settings, module=None, tokenizer=None):
        self.directory, self.module = directory, module or build("rotary", tie_word_embeddings=False)
        save(self.module, directory, tokenizer)
        self.tensors = load_file(directory / "model.safetensors")
        self.dense = dict(self.tensors)
        self.configure(**{QUANTIZED: settings})

    def configure(self, **changes):
        path = self.directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    def linear(self):
        return [n for n in self.dense if n.split(".")[-2] in LINEAR]

    def put(self, name, value, **parts):
        self.dense[name] = value
        self.tensors.pop(name)
        self.tensors |= {n: t.contiguous() for n, t in parts.items()}

    def write(self):
        save_file(self.tensors, self.directory / "model.safetensors", metadata={"format": "pt"})
        return self.directory

    def check(self):
        """The tool's module gives the logits of a plain module with the values put in by hand."""
        found = load_checkpoint(self.write())
        plain = self.directory.parent / "plain"
        shutil.rmtree(plain, ignore_errors=True)
        plain.mkdir()
        save_file(self.dense, plain / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((self.directory / "config.json").read_text("utf-8"))
        config.pop(QUANTIZED, None)
        (plain / "config.json").write_text(json.dumps(config), "utf-8")
        module = transformers.AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
        ids = torch.arange(40)[None] % 64
        with torch.no_grad():
            assert torch.equal(found.module(ids).logits, module(ids).logits)
        assert any("dequantized" in n for n in found.notes)
        assert QUANTIZED not in json.loads(found.files["config.json"])
        return found
