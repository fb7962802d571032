"""The entropy coder against ideal code length, general-purpose compressors, static tables and constriction.

On one model at `--bits` per parameter: payload over the ideal under its own tables, side information + tables +
headers as a share of the file, tokenizer and config against brotli-11, and the size of exactly the same symbols
under brotli-11, zstd-22, lzma-9e and zlib-9. Also decoding speed on one core against constriction's ANS coder.
"""

from __future__ import annotations

import lzma
import time
import zlib
from typing import Any

import brotli
import constriction
import numpy as np
import zstandard

from bytecap.format.coders.grid import CODER as GRID
from bytecap.format.decoder import decode_units
from bytecap.format.entropy.frequencies import Tables
from bytecap.format.entropy.rans import Stream, decode, encode
from bytecap.format.ledger import by_kind
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.fit import fit
from common import parser, record, texts


def main() -> None:
    """Run on every model."""
    p = parser(__doc__ or "")
    p.add_argument("--bits", type=float, default=3.0)
    args = p.parse_args()
    for name in args.model:
        for key, value in one(args, name).items():
            print(f"{key:34s} {value}")


def one(args: Any, name: str) -> dict[str, Any]:
    """All figures of one model."""
    model = load_checkpoint(args.models / name)
    result = fit(
        model, int(args.bits * model.parameters / 8), calibration=texts(args.texts, "calib"),
        evaluation=texts(args.texts, "val"), tokens=args.tokens, evaluation_tokens=args.eval_tokens,
        device=args.device, seed=args.seed,
    )  # fmt: skip
    kinds, size = by_kind(result.ledger()), len(result.data)
    found: list[tuple[Stream, np.ndarray[Any, Any]]] = []
    decode_units(result.contents, observe=lambda s, z: found.append((s, z)) if len(s.data) else None)
    matrices = [(s, z) for s, z in found if len(z) > 8192]
    payload = sum(len(s.data) for s, _ in matrices)
    ideal = sum(s.tables.bits(z, s.classes) / 8 for s, z in matrices)
    files = {f.name: len(brotli.compress(model.files[f.name], quality=11)) for f in result.contents.files}
    raw = [pack(z) for _, z in matrices]
    weights = [u for u in result.contents.units if u.tag == GRID.tag]
    overhead = sum(
        n for u in weights for k, n in GRID.kinds(u.data, u.unit.matrix_shape, u.unit.dtype) if k != "payload"
    )
    return record(args, {
        "benchmark": "coding", "model": name, "bits": args.bits, "file_bytes": size,
        "payload_over_ideal": payload / ideal,
        "side_tables_headers_share": (overhead + kinds.get("table", 0)) / size,
        "side_files": sum(len(f.data) for f in result.contents.files),
        "side_files_brotli11": sum(files.values()),
        "payload": payload, "payload_and_tables": payload + kinds.get("table", 0),
        "static_table_per_tensor": sum(static(z) for _, z in matrices),
        "brotli11": sum(len(brotli.compress(r, quality=11)) for r in raw),
        "zstd22": sum(len(zstandard.ZstdCompressor(level=22).compress(r)) for r in raw),
        "lzma9e": sum(len(lzma.compress(r, preset=9 | lzma.PRESET_EXTREME)) for r in raw),
        "zlib9": sum(len(zlib.compress(r, 9)) for r in raw),
        **speed(matrices),
    })  # fmt: skip


def pack(symbols: np.ndarray[Any, Any]) -> bytes:
    """Symbols as bytes, one each where they fit."""
    small = int(np.abs(symbols).max(initial=0)) < 128
    return symbols.astype(np.int8 if small else "<i2").tobytes()


def static(symbols: np.ndarray[Any, Any]) -> int:
    """Bytes with one static table of the tensor's own, two bytes an entry."""
    values, counts = np.unique(symbols, return_counts=True)
    tables = Tables.from_counts({1: dict(zip(values.tolist(), counts.tolist(), strict=True))}, symmetric=False)
    return len(encode(symbols, np.ones(len(symbols), np.uint8), tables)) + 2 * len(values)


def speed(matrices: list[tuple[Stream, np.ndarray[Any, Any]]]) -> dict[str, float]:
    """Symbols per second, ours (all streams together) and constriction's (one call per class)."""
    count = sum(len(z) for _, z in matrices)
    started = time.perf_counter()
    decode([s for s, _ in matrices])
    ours = time.perf_counter() - started
    symbols = np.concatenate([z for _, z in matrices])
    classes = np.concatenate([s.classes for s, _ in matrices])
    tables = matrices[0][0].tables
    coder = constriction.stream.stack.AnsCoder()
    models, parts = [], []
    for cls in np.unique(classes):
        table = tables.table[int(cls)]
        mine = symbols[classes == cls]
        index = np.clip(mine - table.low, 0, len(table.freq) - 1).astype(np.int32)
        models.append(constriction.stream.model.Categorical(table.freq / table.freq.sum(), perfect=False))
        parts.append(index)
    for model, index in zip(reversed(models), reversed(parts), strict=True):
        coder.encode_reverse(index, model)
    size = 4 * len(coder.get_compressed())
    started = time.perf_counter()
    for model, index in zip(models, parts, strict=True):
        coder.decode(model, len(index))
    theirs = time.perf_counter() - started
    return {
        "lanes_M_per_s": count / ours / 1e6, "constriction_M_per_s": count / theirs / 1e6, "constriction_bytes": size
    }  # fmt: skip


if __name__ == "__main__":
    main()
