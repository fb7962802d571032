"""Check the differences that the pages claim: each must be at least five of its standard errors.

The pages are docs/results.md, docs/recovery.md, docs/sharing.md and the table of results in README.md. The script reads
the committed lines of `results/` and runs nothing. It takes a difference's paired error where the line holds one.
Elsewhere it takes the error of two independent figures, which is an upper bound: what is hard for one model is hard for
the other, and both are read on the same tokens, so a difference of five such errors is one of five paired errors too.
With one calibration seed no error includes the noise of calibration.

A difference that a page calls a tie, or not sure, must be less than five errors. Every figure on a page must be the one
in the lines, and every row of README.md's table must be a row of docs/results.md.

    python benchmarks/claims.py [--results results] [--pages .]

The exit status is 1 if a claimed difference is too small, if a tie is none, or if a page lacks a figure.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ENOUGH = 5.0
Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A difference that a page states.

    Attributes:
        what: its name in the printed table.
        difference: of two figures on the same tokens; nats per token, bits per byte, or one minus a ratio.
        error: its standard error.
        paired: the error is of the difference; otherwise of two independent figures.
        tie: the page says that there is no difference, or that it is not sure.
        figures: texts that the page must hold.
        page: the page, relative to the project.
    """

    what: str
    difference: float
    error: float
    paired: bool
    tie: bool = False
    figures: tuple[str, ...] = ()
    page: str = ""

    @property
    def ratio(self) -> float:
        """The difference in standard errors."""
        return abs(self.difference) / self.error if self.error > 0 else math.nan

    @property
    def holds(self) -> bool:
        """Whether it is as the page says; an unknown error holds nothing."""
        return self.ratio < ENOUGH if self.tie else self.ratio >= ENOUGH


def apart(
    what: str, a: Row, b: Row, value: str, error: str, *, tie: bool = False, figures: Sequence[str] = ()
) -> Claim:
    """Of two lines that hold their own errors only."""
    return Claim(what, a[value] - b[value], math.hypot(a[error], b[error]), False, tie, tuple(figures))


def targets(rows: Sequence[Row]) -> Iterator[Claim]:
    """`bytecap` against `golf`: KL and loss, by model and bits."""
    found = {(r["model"], r["bits"], r["method"]): r for r in rows if r["benchmark"] == "targets"}
    for (name, bits, method), ours in sorted(found.items()):
        golf = found.get((name, bits, "golf"))
        if method != "bytecap" or golf is None:
            continue
        kl, loss = (ours[k] / golf[k] for k in ("kl_nats", "measured_delta_nats"))
        said = f"| {bits} | {kl:.3f} | {loss:.3f} |"
        for word, value, error in (("KL", "kl_nats", "kl_stderr"),
                                   ("loss", "measured_delta_nats", "measured_delta_stderr")):  # fmt: skip
            yield apart(f"{word}, golf minus bytecap, {name}, {bits} bits", golf, ours, value, error, figures=[said])


def methods(rows: Sequence[Row], ours: Sequence[Row]) -> Iterator[Claim]:
    """Every other method against `bytecap`: KL, by model and bits. A cell in `targets` counts, not its repetition."""
    best = {(r["model"], r["bits"]): r for r in [*rows, *ours]
            if r["benchmark"] in {"targets", "methods"} and r["method"] == "bytecap"}  # fmt: skip
    found = {(r["model"], r["bits"], r["method"], r.get("accounting", "")): r
             for r in rows if r["benchmark"] == "methods" and r["method"] != "bytecap"}  # fmt: skip
    for (name, bits, method, accounting), row in sorted(found.items()):
        if (name, bits) not in best:
            continue
        both = (row, best[name, bits])
        what = f"KL, {method} {accounting} minus bytecap, {name}, {bits} bits".replace("  ", " ")
        yield apart(what, *both, "kl_nats", "kl_stderr", figures=[f"{r['kl_nats']:.4f}" for r in both])


_BROTLI = {("small-s0", 3.5), ("small-s1", 3.5), ("base-s1", 2.5), ("base-s1", 3.5)}


def brotli(rows: Sequence[Row], better: Sequence[Row]) -> Iterator[Claim]:
    """`golf` with brotli alone against `golf`: KL, by model and bits; the page calls some of it unsure."""
    found = {(r["model"], r["bits"]): r for r in better if r["benchmark"] == "targets" and r["method"] == "golf"}
    for row in rows:
        cell = (row.get("model"), row.get("bits"))
        if row.get("method") == "golf" and cell in found and cell[1] in {2.5, 3.5}:
            what = f"KL, golf with brotli alone minus golf, {cell[0]}, {cell[1]} bits"
            yield apart(what, row, found[cell], "kl_nats", "kl_stderr", tie=cell in _BROTLI)


# docs/recovery.md says of these that they are less than five errors: (model, bits, figure).
_UNSURE = {(name, 3.5, "loss") for name in ("small-s0", "small-s1", "base-s1")}


def recovery(rows: Sequence[Row]) -> Iterator[Claim]:
    """With recovery against without: KL and loss, by model and bits; and other texts against calibration text."""
    found = {(r["model"], r["bits"]): r for r in rows if r["benchmark"] == "recover" and "without_recovery" in r}
    for (name, bits), row in sorted(found.items()):
        plain = row["without_recovery"]
        for word, value, error, paired in (
            ("KL", "kl_nats", "kl_stderr", "kl_difference_stderr"),
            ("loss", "measured_delta_nats", "measured_delta_stderr", "delta_difference_stderr"),
        ):
            what = f"{word}, recovery's gain, {name}, {bits} bits"
            said = [f"{r[value]:.4f}" for r in (plain, row)]
            tie = (name, bits, word) in _UNSURE
            if paired in plain:
                yield Claim(what, plain[value] - row[value], plain[paired], True, tie, tuple(said))
            else:
                yield apart(what, plain, row, value, error, tie=tie, figures=said)
    texts = {r["text"]: r for r in rows if r["benchmark"] == "recover-text"}
    for name in sorted(set(texts) - {"calib"}):
        said = [f"{texts[n]['kl_ratio']:.3f}" for n in (name, "calib")]
        what = f"KL, recovery on text {name} minus on calibration text"
        yield apart(what, texts[name], texts["calib"], "kl_nats", "kl_stderr", tie=True, figures=said)
    tuned = [r for r in rows if r["benchmark"] == "recover-fine-tuning"]
    for name in sorted({r["model"] for r in tuned}):
        best = min((r for r in tuned if r["model"] == name), key=lambda r: float(r["measured_delta_nats"]))
        value, error = best["measured_delta_nats"], best["measured_delta_stderr"]
        yield Claim(f"loss, {name} fine-tuned", value, error, True, True, (f"{value:+.4f} ± {error:.4f}",))


def golf(rows: Sequence[Row]) -> Iterator[Claim]:
    """Parameter Golf: the share of golf's gap that `bytecap` saves; its error is paired, over documents."""
    for row in rows:
        if row["benchmark"] != "golf" or row["cell"] not in {"3.5bits", "16000000"}:
            continue
        gaps = {n: e["gap"] for n, e in row["exports"].items()}
        digits = 4 if row["cell"] == "3.5bits" else 5
        stated = row["model"] == "baseline" or row["cell"] == "3.5bits"
        said = [f"{gaps[n]:.{digits}f}" for n in ("bytecap", "golf") if stated]
        error = max(row["gap_ratio_stderr"], row["gap_ratio_stderr_by_document"])
        what = f"share of golf's gap saved, {row['model']}, {row['budget']:,} bytes"
        yield Claim(what, 1 - row["gap_ratio"], error, True, figures=tuple(said))
        if row["exports"]["int8+zlib"]["fits"]:
            both = (row["exports"]["int8+zlib"], row["exports"]["bytecap"])
            what = f"gap, int8 + zlib minus bytecap, {row['model']}, {row['budget']:,} bytes"
            yield apart(what, *both, "gap", "gap_stderr", figures=[f"{gaps['int8+zlib']:.5f}"] if stated else [])


# docs/sharing.md is not sure that these arms differ, by model and figure.
_EQUAL_ARMS = {("small-s0", "f", "b-reinvested", "kl"), ("small-s0", "f", "b-reinvested", "loss"),
               ("base-s1", "g", "b-reinvested", "loss"), ("base-s1", "g", "e", "loss")}  # fmt: skip


def composition(rows: Sequence[Row]) -> Iterator[Claim]:
    """Arms against one another: KL and loss, by model and size; and the figures of every arm."""
    found = {(r["model"], r["size"], r["arm"], r.get("against")): r
             for r in rows if r["benchmark"] == "composition-summary"}  # fmt: skip
    for (model, size, arm, against), row in sorted(found.items(), key=str):
        if against is None:
            continue
        both = (found[model, size, arm, None], found[model, size, against, None])
        said = tuple(f"{r['kl']['mean']:.3f} / {r['loss']['mean']:+.3f}" for r in both)
        for word in ("kl", "loss"):
            what = f"{word}, arm {arm} minus arm {against}, {model}, {size}"
            tie = (model, arm, against, word) in _EQUAL_ARMS
            yield Claim(what, row[word]["mean"], row[word]["stderr"], True, tie, figures=said)


def searches(rows: Sequence[Row]) -> Iterator[Claim]:
    """The greedy search against the loop and Dynamic Layer Tying: KL after uptraining, paired by seed."""
    found: dict[str, dict[int, float]] = {}
    for r in rows:
        found.setdefault(r["search"], {})[r["seed"]] = r["uptraining"]["kl"]
    means = {n: sum(x.values()) / len(x) for n, x in found.items()}
    for other in sorted(set(found) - {"greedy"}):
        apart_by = [found[other][n] - kl for n, kl in found["greedy"].items()]
        error = statistics.stdev(apart_by) / math.sqrt(len(apart_by))
        said = tuple(f"{means[n]:.2f}" for n in (other, "greedy"))
        yield Claim(f"KL, {other} minus greedy", means[other] - means["greedy"], error, True, figures=said)


def training(rows: Sequence[Row]) -> Iterator[Claim]:
    """Layers of pQuant and the rate term against a plain model, as coded, in the last training; and the earlier tie."""
    pairs = [r for r in rows if r["benchmark"] == "train-pair" and r.get("of") == "coded"]
    last = {(r["first"], r["size"]): r for r in pairs if r["second"] == "plain" and r["seeds"] == [0]}
    tied = [r for r in pairs if r["first"] == "pquant" and r["second"] == "plain,phases=2,lr=4e-3"]
    said = {("pquant", "pquant"): False, ("rate,mu=1e-8", "2.5"): False, ("rate,mu=1e-8", "3.5"): True}
    for row, tie in [*((last[k], t) for k, t in said.items()), (tied[-1], True)]:
        mean, error = row["bpb_difference"]["mean"], row["bpb_difference"]["stderr"]
        what = f"bits per byte, {row['first']} minus {row['second']}, {row['size']}"
        yield Claim(what, mean, error, True, tie, (f"{mean:+.3f} ± {error:.3f}",))


def formats(rows: Sequence[Row]) -> Iterator[Claim]:
    """Files for other programs against the tools of these: KL at equal bytes, by model, recipe and menu."""
    found = {(r["model"], r["recipe"], r["method"]): r for r in rows if r["benchmark"] == "formats"}
    for (name, recipe, method), ours in found.items():
        if method == "stock" or (name, recipe, "stock") not in found:
            continue
        theirs = found[name, recipe, "stock"]
        said = f"{ours['kl_nats']:.4f}"
        said = f"{theirs['kl_nats']:.4f} | {said}" if method == "bytecap" else said
        what = f"KL, their {recipe} minus {method}, {name}"
        yield apart(what, theirs, ours, "kl_nats", "kl_stderr", figures=[said])


Reader = Callable[[Sequence[Row]], Iterator[Claim]]
RESULTS = "docs/results.md"
FILES: dict[str, tuple[Reader, str]] = {
    "targets": (targets, RESULTS), "recover": (recovery, "docs/recovery.md"), "golf": (golf, RESULTS),
    "composition": (composition, "docs/sharing.md"), "train": (training, RESULTS),
    "searches": (searches, "docs/sharing.md"), "formats": (formats, RESULTS),
}  # fmt: skip


def claims(directory: Path) -> list[Claim]:
    """All claims of the lines in a directory, later lines replacing earlier ones."""
    rows = {n: [json.loads(x) for x in (directory / f"{n}.jsonl").read_text("utf-8").splitlines()]
            for n in (*FILES, "methods", "targets-8-states", "targets-golf-brotli")}  # fmt: skip
    found = [replace(c, page=page) for name, (read, page) in FILES.items() for c in read(rows[name])]
    eight = rows["targets-8-states"]  # of the day on which the other methods were measured
    more = [*methods(rows["methods"], eight), *brotli(rows["targets-golf-brotli"], eight)]
    return found + [replace(c, page=RESULTS) for c in more]


def strangers(pages: Path) -> list[str]:
    """Rows of README.md's table of results that docs/results.md lacks."""
    table = (pages / "README.md").read_text("utf-8").partition("<!-- results -->")[2].partition("<!-- end -->")[0]
    rows = [x for x in table.splitlines() if x.startswith("|") and any(c.isdigit() for c in x)]
    there = set((pages / RESULTS).read_text("utf-8").splitlines())
    return [x for x in rows if x not in there] if rows else ["(no table of results)"]


def main() -> int:
    """Print the table; 1 where a page says more than was measured."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--results", type=Path, default=Path("results"))
    p.add_argument("--pages", type=Path, default=Path())
    args = p.parse_args()
    found = sorted(claims(args.results), key=lambda c: (c.tie, c.ratio))
    texts = {n: " ".join((args.pages / n).read_text("utf-8").split()) for n in {c.page for c in found}}
    wrong = 0
    print(f"{'difference':>11s} {'error':>9s} {'ratio':>6s}  error of     said to be")
    for c in found:
        missing = [f for f in c.figures if f not in texts[c.page]]
        note = "" if c.holds else "   NOT SO"
        note += f"   {c.page} lacks {', '.join(missing)}" if missing else ""
        wrong += bool(note)
        kind, said = "pairs" if c.paired else "two figures", "not sure" if c.tie else "there"
        print(f"{c.difference:+11.5f} {c.error:9.5f} {c.ratio:6.1f}  {kind:11s}  {said:12s}  {c.what}{note}")
    for row in strangers(args.pages):
        wrong += 1
        print(f"README.md says what {RESULTS} does not: {row}")
    print(f"{wrong} statements do not hold" if wrong else "all statements hold")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
