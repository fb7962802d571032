"""How much rounding to the source's 16 bits changes: KL of unpacked directories, float32 beside the source's dtype.

Both directories are read as any other checkpoint is and run in float32 on the same windows.

    python benchmarks/unpack_dtype.py --models DIR --texts DIR --model small-s0 --bits 2.5 4
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import bytecap
from bytecap.model.checkpoint import load_checkpoint
from bytecap.model.evaluation import by_window
from bytecap.model.sources import encoder
from bytecap.model.texts import load_text
from bytecap.model.uncertainty import ratio_stderr
from bytecap.pipeline.export import unpack
from common import parser, record, texts


def main() -> None:
    """Measure every model at every number of bits."""
    p = parser(__doc__.split("\n")[0])
    p.add_argument("--bits", nargs="*", type=float, default=(2.5, 4.0))
    p.add_argument("--method", default="bytecap")
    p.add_argument("--dtype", default="source", help="bfloat16 for a source that is float32")
    args = p.parse_args()
    for name in args.model:
        original = load_checkpoint(args.models / name)
        encode, held = encoder(original.files), texts(args.texts, "val")
        each = args.eval_tokens // len(held)
        windows = [w for t in held for w in load_text(t, encode, window=512, limit=each).windows]
        for bits in args.bits:
            with tempfile.TemporaryDirectory() as place:
                path = Path(place) / "a.bcap"
                bytecap.fit(
                    args.models / name, f"{bits}bpp", calibration=texts(args.texts, "calib"), evaluation=held,
                    seed=args.seed, output=path, tokens=args.tokens, evaluation_tokens=1024, device=args.device,
                    method=args.method, progress=False,
                )  # fmt: skip
                found = {}
                for dtype in ("float32", args.dtype):
                    written = unpack(path, Path(place) / dtype, dtype=dtype)
                    coded = load_checkpoint(Path(place) / dtype).module
                    found[dtype] = by_window(original.module, coded, {"": {}}, windows)[""]
                    size = (Path(place) / dtype / "model.safetensors").stat().st_size
                    print(f"{name} {bits} {dtype}: written as {written}, {size:,} bytes", flush=True)
            exact, rounded = found["float32"], found[args.dtype]
            row = {"benchmark": "unpack_dtype", "model": name, "method": args.method, "bits": bits, "written": written}
            row |= {
                "kl_float32": float(exact.kl.sum() / exact.tokens.sum()),
                "kl_source": float(rounded.kl.sum() / rounded.tokens.sum()),
                "difference_stderr": ratio_stderr(rounded.kl - exact.kl, exact.tokens),
            }
            record(args, row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
