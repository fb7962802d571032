r"""Write a model card (README.md of a model on a hub): where the bytes went, quality with errors, how to load it.

Names come from files of strangers: those that are not plain words are written as HTML entities, and values of the
front matter as JSON strings, which YAML reads as they are meant. Figures are taken from a fit's report where there is
one. The licence is that of the source: its front matter is read line by line, never by a YAML library.

>>> quoted("model.layers.0.weight"), quoted("a|<b>\n[x](y)")
('`model.layers.0.weight`', 'a&#124;&#60;b&#62;&#92;n&#91;x&#93;&#40;y&#41;')
>>> licence_of("---\ntags:\n- x\nlicense: mit\n---\nlicense: other\n")
{'license': 'mit'}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bytecap.escape import shown
from bytecap.format.ledger import Entry, by_kind, by_unit, total
from bytecap.runtimes.hub import FILE, INSTALL

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]*")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_LICENCE_KEYS = ("license", "license_name", "license_link")
_MEANINGS = {
    "payload": "symbols of the weights, entropy coded", "side": "steps and spreads of rows and columns",
    "table": "shared tables", "index": "names and shapes", "header": "header and checksums",
    "config": "configuration", "tokenizer": "tokenizer", "code": "source code", "padding": "zeros",
}  # fmt: skip
_LONGEST = 100  # characters of a name
_MOST = 5  # rows of a table of names


@dataclass(frozen=True)
class Source:
    """The model that a file was made of, as far as it is known.

    Attributes:
        name: of the model.
        licence: `license`, `license_name` and `license_link` of its own card.
        licence_file: name of the licence's text beside the card, if there is one.
    """

    name: str = ""
    licence: Mapping[str, str] = field(default_factory=dict)
    licence_file: str = ""


def card(
    entries: Sequence[Entry],
    report: Mapping[str, Any],
    source: Source,
    *,
    whole: bool,
    brief: bool = False,
    base: str = "",
) -> str:
    """Return the text of a card.

    Args:
        entries: owner and kind of every byte.
        report: of the fit; empty where it is not known.
        source: of the model.
        whole: the card lies in a directory that transformers loads, not beside a single file.
        brief: leave out what names tensors and texts.
        base: SHA-256 of the file that an update is read with; empty for any other file.
    """
    parts = [_front_matter(source), _about(entries, report, source, whole, base), _commands(whole, base)]
    parts += [_bytes(entries, brief), _quality(report, brief), _calibration(report, brief), _licence(source)]
    return "\n".join(p for p in parts if p)


def quoted(name: str) -> str:
    """Return a name as Markdown shows it and nothing else: as code if it is plain, else with entities."""
    short = shown(name, most=_LONGEST)
    if _PLAIN.fullmatch(short):
        return f"`{short}`"
    return "".join(c if c.isalnum() or c in " -" else f"&#{ord(c)};" for c in short)


def licence_of(text: str) -> dict[str, str]:
    """Return the licence that the front matter of a card names."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
    found: dict[str, str] = {}
    for line in match[1].splitlines() if match else ():
        key, colon, value = line.partition(":")
        if colon and key in _LICENCE_KEYS and (value := value.strip().strip("'\"")):
            found[key] = value[:_LONGEST]
    return found


def _front_matter(source: Source) -> str:
    """Return the YAML block that hubs read."""
    lines = ["---", *(f"{k}: {json.dumps(source.licence[k])}" for k in _LICENCE_KEYS if k in source.licence)]
    if _REPOSITORY.fullmatch(source.name):
        lines += [f"base_model: {json.dumps(source.name)}", "base_model_relation: quantized"]
    return "\n".join(
        [*lines, "library_name: transformers", "pipeline_tag: text-generation", "tags: [bytecap]", "---", ""]
    )


def _about(entries: Sequence[Entry], report: Mapping[str, Any], source: Source, whole: bool, base: str) -> str:
    """Return the title and its paragraph."""
    name = quoted(source.name) if source.name else "A language model"
    size, budget, parameters = total(entries), _number(report, "budget_bytes"), _number(report, "parameters")
    parameters = parameters or sum({e.unit: e.parameters for e in entries}.values())
    beside = " beside this card" if whole else ""
    cap = f"{', all' if whole else ''} under a cap of {budget:,.0f} bytes" if budget else ""
    if base:
        return f"# {name} by bytecap\n\nAn update in {size:,} bytes{cap} of the file with SHA-256 `{base}`.\n"
    rate = f", {8 * size / parameters:.3f} bits for each of {parameters:,.0f} parameters" if parameters else ""
    return f"# {name} by bytecap\n\nThe model in {size:,} bytes{beside}{cap}{rate}.\n"


def _commands(whole: bool, base: str) -> str:
    """Return the commands that load the model."""
    lines = ["## How to load it", "", "```", "pip install 'bytecap[hf]'", "```", ""]
    if whole:
        lines += [
            "```python", "import bytecap.runtimes.transformers  # teaches transformers to read model.bcap",
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'model = AutoModelForCausalLM.from_pretrained("DIR")  # this directory or its id on the hub',
            'tokenizer = AutoTokenizer.from_pretrained("DIR")', "```", "",
            f"Without the import transformers refuses the directory and says: {INSTALL}.",
        ]  # fmt: skip
    else:
        files = f'"{FILE}", base="BASE.bcap"' if base else f'"{FILE}"'
        lines += ["```python", "import bytecap", "", f"module = bytecap.load_model({files})", "```"]
    return "\n".join([*lines, ""])


def _bytes(entries: Sequence[Entry], brief: bool) -> str:
    """Return the ledger."""
    size = max(1, total(entries))
    lines = ["## Where the bytes are", "", "| kind | bytes | share | |", "|---|---:|---:|---|"]
    lines += [f"| {k} | {n:,} | {100 * n / size:.2f}% | {_MEANINGS[k]} |" for k, n in by_kind(entries).items()]
    if not brief:
        lines += ["", "| largest owners | bytes | bits per parameter |", "|---|---:|---:|"]
        for line in by_unit(entries)[:_MOST]:
            bits = f"{8 * line.bytes / line.parameters:.3f}" if line.parameters else ""
            lines.append(f"| {quoted(line.unit)} | {line.bytes:,} | {bits} |")
    return "\n".join([*lines, ""])


def _quality(report: Mapping[str, Any], brief: bool) -> str:
    """Return what was measured of the finished file, with standard errors."""
    rows = [_scores("all", report)]
    texts = report.get("texts")
    if isinstance(texts, list) and not brief and len(texts) > 1:
        rows += [_scores(quoted(str(t.get("name", ""))), t) for t in texts[:_MOST] if isinstance(t, dict)]
    if not any(rows):
        return ""
    said = "Measured on the file after it was read back, on text that nothing was fitted to; ± is one standard error."
    head = ["| text | KL to the original, nats per token | bits per byte, original → file | same top-1 token |"]
    return "\n".join(["## Quality", "", said, "", *head, "|---|---:|---:|---:|", *(r for r in rows if r), ""])


def _scores(name: str, figures: Mapping[str, Any]) -> str:
    """Return a row of figures; empty where they are unknown."""
    kl, error = _number(figures, "kl_nats"), _number(figures, "kl_stderr")
    before, after, paired = (_number(figures, f"bpb_{k}") for k in ("original", "artifact", "stderr"))
    top = _number(figures, "same_top1")
    if kl is None and after is None:
        return ""
    quality = "" if kl is None or error is None else f"{kl:.4f} ± {error:.4f}"
    bits = "" if before is None or after is None or paired is None else f"{before:.4f} → {after:.4f} ± {paired:.4f}"
    return f"| {name} | {quality} | {bits} | {'' if top is None else f'{100 * top:.1f}%'} |"


def _calibration(report: Mapping[str, Any], brief: bool) -> str:
    """Return how the file was made."""
    tokens, texts = _number(report, "statistics_tokens"), report.get("calibration_texts")
    if tokens is None:
        return ""
    lines = ["## How it was made", ""]
    named = [quoted(str(t.get("name", ""))) for t in texts or () if isinstance(t, dict)] if not brief else []
    on = f" of {', '.join(named[:_MOST])}" if named else ""
    seed = _number(report, "seed")
    method = quoted(str(report.get("method", "bytecap")))
    lines.append(
        f"Method {method}, calibrated on {tokens:,.0f} tokens{on}{'' if seed is None else f', seed {seed:.0f}'}."
    )
    return "\n".join([*lines, ""])


def _licence(source: Source) -> str:
    """Return whose licence holds."""
    named = source.licence.get("license_name") or source.licence.get("license")
    if named:
        where = f"; its text is in {quoted(source.licence_file)}" if source.licence_file else ""
        return f"## Licence\n\nThat of the source: {quoted(named)}{where}.\n"
    if source.licence_file:
        return f"## Licence\n\nThat of the source, in {quoted(source.licence_file)}.\n"
    return "## Licence\n\nThat of the source, which names none here.\n"


def _number(figures: Mapping[str, Any], key: str) -> float | None:
    """Return a figure if it is one."""
    value = figures.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
