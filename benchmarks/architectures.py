"""Try every architecture that transformers offers: fit, unpack, reload, and compare logits, on tiny random models.

    python benchmarks/architectures.py                     # all families; lines that are there already stay
    python benchmarks/architectures.py --only gpt2 llama   # these again
    python benchmarks/architectures.py --page              # the page from the lines alone

Each family is built from its config class (`tiny_models.py`), saved as an ordinary directory, and put through two fits:
one lossy, at half a byte a parameter and some for the tokenizer (1.5, or just above the floor, where that is below it),
and one without loss. A family *works* if

- both files meet their budgets,
- `bytecap.load_model` and transformers, reading what `unpack` wrote, give the same logits bit for bit,
- the lossless file gives the source's logits bit for bit,
- and unpacked it is the source's tensors, names, shapes and dtypes.

It is *refused* if bytecap says in one line why it does not take the model, *wrong* if a check fails, and *failed* if
anything else is raised. Each family runs in a process of its own. Lines go to `results/architectures.jsonl`, the table
to `docs/architectures.md`. Nothing here says how well a family compresses: weights are random.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tiny_models

ROOT = Path(__file__).resolve().parents[1]
LINES, PAGE = ROOT / "results" / "architectures.jsonl", ROOT / "docs" / "architectures.md"
KINDS = {  # in this order; a family that is in several belongs to the first
    "decoder": ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    "encoder-decoder": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    "encoder": ("MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    "multimodal": ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", "AutoModelForImageTextToText"),
}
LARGEST, SECONDS = 7_000_000, 600
UNTRIED = "not tried"
OUTCOMES = ("works", "refused", "wrong", "failed", "not built", UNTRIED)
Row = dict[str, Any]


def families() -> list[tuple[str, str]]:
    """(kind, family) of everything in transformers' tables; a family with several kinds is listed under each."""
    from transformers.models.auto import modeling_auto

    return [(kind, name) for kind, (table, _) in KINDS.items() for name in getattr(modeling_auto, table)]


def texts(directory: Path) -> tuple[Path, Path]:
    """A calibration and an evaluation text, cut from the embedded ones."""
    from bytecap.model.checkpoint import demo_directory

    found = []
    for name, size in (("calib", 24_000), ("val", 8_000)):
        found.append(directory / f"{name}.txt")
        found[-1].write_text((demo_directory() / f"{name}.txt").read_text("utf-8")[:size], "utf-8")
    return found[0], found[1]


def tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", "<pad>", *alphabet])}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.save(str(directory / "tokenizer.json"))


def build(kind: str, name: str, directory: Path) -> tuple[Any, int]:
    """A tiny random model of a family, saved; its class to read it with, and its parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    auto = getattr(transformers, KINDS[kind][1])
    module = auto.from_config(tiny_models.config(name)).eval()
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim == 1 and p.is_floating_point():
                p.add_(0.05 * torch.randn_like(p))
    module.save_pretrained(directory)
    tokenizer(directory)
    return type(module), sum(p.numel() for p in module.parameters())


def logits(module: Any) -> Any:
    """Logits of a module on fixed tokens; an encoder-decoder is given them on both sides.

    They are a copy's: weights mapped from a file lie at other addresses, where some kernels add in another order.
    """
    import torch

    module = copy.deepcopy(module)
    ids = torch.randint(2, 250, (2, 40), generator=torch.Generator().manual_seed(1))
    more = {"decoder_input_ids": ids} if getattr(module.config, "is_encoder_decoder", False) else {}
    with torch.no_grad():
        return module.float().eval()(input_ids=ids, use_cache=False, **more).logits


def try_family(kind: str, name: str, work: Path) -> Row:
    """The outcome of a family: the members of its line but for its name."""
    import torch

    import bytecap
    from bytecap.pipeline.export import unpack

    try:
        cls, count = build(kind, name, work / "source")
    except Exception as exc:  # noqa: BLE001 (the table says which)
        return {"outcome": "not built", "reason": line(exc)}
    row: Row = {"class": cls.__name__, "parameters": count}
    if count > LARGEST:
        return row | {"outcome": "not built", "reason": f"{count:,} parameters, too many for this check"}
    calibration, evaluation = texts(work)
    shared: Row = {
        "calibration": calibration,
        "evaluation": evaluation,
        "tokens": 1000,
        "evaluation_tokens": 400,
        "window": 128,
    }
    wrong = []
    try:
        every = {"lossy": (count // 2 + 12_000, 3 * count // 2 + 12_000), "lossless": (5 * count + 60_000,)}
        for label, budgets in every.items():
            artifact, budget = first_fit(work / "source", budgets, shared)
            size = artifact.save(work / f"{label}.bcap")
            unpack(work / f"{label}.bcap", work / label, dtype="auto")
            loaded = cls.from_pretrained(work / label, dtype=torch.float32)
            if size > budget:
                wrong.append(f"{label}: {size} bytes for a budget of {budget}")
            if label == "lossy":
                row |= {"bits": artifact.report["bits_per_parameter"], "kl_nats": artifact.report["kl_nats"]}
                other, said = bytecap.load_model(work / "lossy.bcap"), "load_model and the unpacked directory differ"
            else:
                other, said = cls.from_pretrained(work / "source", dtype=torch.float32), "lossless, but logits differ"
                if not artifact.report["lossless"]:
                    wrong.append("a budget above the lossless size, and the file is lossy")
                wrong += differing(work / "source", work / label)
            if not torch.equal(logits(loaded), logits(other)):
                wrong.append(said)
    except bytecap.BytecapError as exc:
        return row | {"outcome": "refused", "reason": line(exc).replace(str(work), "DIR")}
    except Exception as exc:  # noqa: BLE001 (the table says which)
        return row | {"outcome": "failed", "reason": f"{type(exc).__name__}: {line(exc)}".replace(str(work), "DIR")}
    return row | {"outcome": "wrong" if wrong else "works", "reason": "; ".join(wrong)}


def differing(source: Path, unpacked: Path) -> list[str]:
    """Return the first difference between the tensors of two directories: names, shapes, dtypes or values."""
    import torch
    from safetensors.torch import load_file

    one, other = ({n: t for f in d.glob("*.safetensors") for n, t in load_file(f).items()} for d in (source, unpacked))
    if names := sorted(one.keys() ^ other.keys()):
        return [f"unpack writes other names than the source: {names[0]}"]
    odd = [n for n, t in one.items() if t.dtype != other[n].dtype or not torch.equal(t, other[n])]
    return [f"unpack writes {min(odd)} in another dtype, shape or value"] if odd else []


def first_fit(source: Path, budgets: tuple[int, ...], options: Row) -> tuple[Any, int]:
    """The first fit whose budget is not below the floor, which large buffers may lift above all of them."""
    import bytecap

    for budget in budgets:
        try:
            return bytecap.fit(source, budget, **options), budget
        except bytecap.BudgetError as exc:
            floor = exc.floor
    above = floor + floor // 20
    return bytecap.fit(source, above, **options), above


def line(exc: BaseException) -> str:
    """The first line of an exception's text, not too long."""
    text = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return text if len(text) <= 160 else text[:157] + "..."


def child(kind: str, name: str, end: Connection) -> None:
    """One family, silently, in a process of its own."""
    import transformers

    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as work:
        end.send(try_family(kind, name, Path(work)))


def measure(kind: str, name: str) -> Row:
    """The line of a family."""
    import torch
    import transformers

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    started = time.time()
    process = context.Process(target=child, args=(kind, name, theirs))
    process.start()
    theirs.close()
    try:
        found: Row = ours.recv() if ours.poll(SECONDS) else {"outcome": "failed", "reason": f"not done in {SECONDS} s"}
    except EOFError:
        found = {"outcome": "failed", "reason": "the process died"}
    process.kill()
    process.join()
    return {"benchmark": "architectures", "family": name, "kind": kind, **found, "torch": torch.__version__,
            "seconds": round(time.time() - started, 1), "transformers": transformers.__version__,
            "command": f"python benchmarks/architectures.py --only {name}"}  # fmt: skip


def read(path: Path) -> dict[tuple[str, str], Row]:
    """Lines by kind and family; later ones replace earlier ones."""
    if not path.exists():
        return {}
    return {(r["kind"], r["family"]): r for r in map(json.loads, path.read_text("utf-8").splitlines())}


TITLES = {
    "decoder": "Decoders: `AutoModelForCausalLM`", "encoder-decoder": "Encoder-decoders: `AutoModelForSeq2SeqLM`",
    "encoder": "Encoders: `AutoModelForMaskedLM`", "multimodal": "Multimodal: `AutoModelForImageTextToText`",
}  # fmt: skip


def page(rows: dict[tuple[str, str], Row]) -> str:
    """docs/architectures.md."""
    some = next(r for r in rows.values() if "transformers" in r)
    text = ["# Architectures tried", "", HEAD.format(transformers=some["transformers"]).strip(), "",
            f"| | {' | '.join(OUTCOMES)} |", "|---|" + "---:|" * len(OUTCOMES)]  # fmt: skip
    for kind in KINDS:
        counts = [sum(r["outcome"] == o for k, r in rows.items() if k[0] == kind) for o in OUTCOMES]
        text.append(f"| {kind} | " + " | ".join(map(str, counts)) + " |")
    for kind, title in TITLES.items():
        mine = sorted((r for k, r in rows.items() if k[0] == kind), key=lambda r: r["family"])
        fine = ", ".join(f"`{r['family']}`" for r in mine if r["outcome"] == "works")
        text += ["", f"## {title}", "", f"Works ({sum(r['outcome'] == 'works' for r in mine)}): {fine or 'none'}.", ""]
        rest = [r for r in mine if r["outcome"] not in {"works", UNTRIED}]
        if rest:
            text += ["| family | outcome | reason |", "|---|---|---|"]
            cell = lambda x: x.replace("|", "\\|").replace("<", "&lt;")  # noqa: E731
            text += [f"| `{r['family']}` | {r['outcome']} | {cell(r['reason'])} |" for r in rest]
        untried = ", ".join(f"`{r['family']}`" for r in mine if r["outcome"] == UNTRIED)
        text += ["", f"Not tried: {untried}."] if untried else []
    return "\n".join(text) + "\n"


HEAD = """
Every family in the tables of transformers {transformers}, each as a tiny random model: fit, unpack, reload, logits
compared. `python benchmarks/architectures.py` makes this page and `results/architectures.jsonl` (bits, KL, classes,
seconds); its head says what is checked. Weights are random, so nothing here says how well a family compresses.

**works**: both a lossy and a lossless file meet their budgets, `bytecap.load_model` and transformers (reading the
unpacked directory) give the same logits bit for bit, and the lossless file gives the source's. **refused**: one line
says why. **wrong**: a check failed. **failed**: an error that is not ours. **not built**: no tiny model could be made
from the config class by the names of its attributes, so nothing is known. **not tried**: the run has not come to it.

bytecap reads a model as a causal language model. It has no input for the other side of an encoder-decoder, for masked
tokens, images or sound, so it can neither calibrate nor score with them:

- **Encoder-decoders** (T5, BART) are refused by name.
- **Encoders** (BERT) are refused: predictions that change with later tokens are no language model's. A type that
  transformers has no causal class for is refused by the name of what it is.
- **Multimodal models** work where transformers reads them as a causal language model. Units that text does not reach,
  such as a vision tower, are kept at a rate that is safe without knowledge, or exactly, and a note says so.

For all others pass the module, batches and a loss of your own: `bytecap.fit(module, budget=..., calibration=batches,
loss=...)` ([modules.md](modules.md)) stores every parameter.
"""


def main() -> None:
    """Measure what is missing, or what --only names, and write the page."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", help="families to try again")
    p.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    p.add_argument("--page", action="store_true", help="only write the page again")
    p.add_argument("--again", action="store_true", help="try all of them again")
    args = p.parse_args()
    rows = read(LINES)
    if not args.page:
        import torch

        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as work:  # imports and compiles what every fork needs
            try_family("decoder", "llama", Path(work))
        every = families()
        rows = {k: rows.get(k) or {"kind": k[0], "family": k[1], "outcome": UNTRIED, "reason": ""} for k in every}
        for kind, name in every:
            if kind not in args.kinds or (args.only is not None and name not in args.only):
                continue
            if rows[kind, name]["outcome"] != UNTRIED and args.only is None and not args.again:
                continue
            rows[kind, name] = row = measure(kind, name)
            print(f"{kind:16s} {name:24s} {row['outcome']:10s} {row['seconds']:6.1f} s  {row['reason']}", flush=True)
            LINES.write_text("".join(json.dumps(rows[k]) + "\n" for k in sorted(rows)), "utf-8")
    PAGE.write_text(page(rows), "utf-8")


if __name__ == "__main__":
    main()
