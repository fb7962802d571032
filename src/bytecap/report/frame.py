"""Frame every page: one self-contained file, light and dark, for screens of any width and for paper.

A page is built of sections, each a module of its own with an `ORDER` and a `section(found)` that returns markup, or
nothing where it has nothing to show: a chart is added by adding a file. Everything can be read without the script,
which only adds sorting, filtering and tips on focus. A content security policy forbids every request.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Mapping, Sequence
from html import escape
from types import ModuleType
from typing import Any

from bytecap.report.svg import DARK

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #d9dee4; --dim: #57606a; --heat: #0072B2;
  --shade: #0003; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0f1318; --soft: #30363d; --dim: #9aa4ae;
  --heat: #56B4E9; --shade: #fff3; }
  DARKER }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 96rem; padding: 1.5rem; overflow-wrap: break-word; } p, ul:not(.cards) { max-width: 48rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; } .dim { color: var(--dim); }
svg text { font: 13px system-ui, sans-serif; fill: var(--ink); paint-order: stroke;
  stroke: var(--paper); stroke-width: 3px; } svg .grid { stroke: var(--soft); }
svg polyline { fill: none; stroke-width: 2; } figure { margin: 1rem 0; max-width: 60rem; }
figure > svg { display: block; width: 100%; } .slim { display: none; }
.key { display: inline-block; margin-right: 1.2rem; white-space: nowrap; } .verdict { font-weight: 600; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
.wide { overflow: auto; max-height: 85vh; background: linear-gradient(to right, var(--paper) 40%, transparent) local,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0 local,
  linear-gradient(to right, var(--shade), transparent) scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 scroll;
  background-repeat: no-repeat; background-size: 3rem 100%, 3rem 100%, .8rem 100%, .8rem 100%; }
thead th { position: sticky; top: 0; background: var(--paper); }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--soft); } th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
td:where(:first-child:has(wbr ~ wbr)) { min-width: 15rem; }
td.words { text-align: left; white-space: normal; min-width: 16rem; }
caption { text-align: left; color: var(--dim); padding-bottom: .3rem; }
caption span { position: sticky; left: 0; display: block; max-width: min(48rem, 100vw - 2rem); }
th button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
:focus-visible { outline: 3px solid #E69F00; outline-offset: 2px; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1rem 0; padding: 0; list-style: none; }
.cards > li { border: 1px solid var(--soft); border-radius: .5rem; padding: .6rem 1rem; flex: 1 1 11rem; }
.cards b { display: block; font-size: 1.25rem; } .verdicts > li { flex-basis: 18rem; } .verdicts p { margin: .4rem 0; }
svg.strip { display: block; width: 100%; max-width: 20rem; }
svg.bar { display: block; width: 100%; height: 1.2rem; }
svg.bar rect, .mark > :not(line) { stroke: var(--ink); stroke-width: .6; }
td.bars { min-width: 9rem; width: 30%; }
td.heat { background: color-mix(in srgb, var(--heat) calc(var(--v) * 60%), transparent); print-color-adjust: exact; }
pre { white-space: pre-wrap; border: 1px solid var(--soft); padding: .6rem; border-radius: .4rem; }
.filter { display: none; margin: .5rem 0; } .live .filter { display: block; }
#tip { position: fixed; z-index: 9; background: var(--ink); color: var(--paper); padding: .2rem .6rem;
  border-radius: .3rem; font-size: .9rem; max-width: 22rem; pointer-events: none; }
@media (max-width: 40rem) { .broad { display: none; } .slim { display: block; } body { padding: 1rem; }
  th, td { padding: .2rem .5rem; }
  tbody > tr > :first-child { white-space: normal; min-width: 7rem; max-width: 9rem; }
  .cards > li { flex-basis: 8rem; padding: .5rem .7rem; } .cards b { font-size: 1.1rem; }
  .verdicts > li { flex-basis: 100%; }
  ul:not(.cards) { padding-left: 1.2rem; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #bbb; --dim: #333; color-scheme: light; }
  body, p { max-width: none; } body { padding: 0; font-size: 10pt; } figure { break-inside: avoid; }
  .wide { overflow: visible; max-height: none; background: none; } thead th { position: static; }
  th, .key, tbody > tr > :first-child { white-space: normal; } tbody > tr > :first-child { min-width: 0; }
  th, td { padding: .1rem .2rem; font-size: 7pt; }
  td.words { min-width: 5rem; } td.bars { min-width: 4rem; width: auto; }
  tr, li { break-inside: avoid; } .filter, #tip { display: none !important; } }
"""

# Colours are attributes of the marks, so that a chart stands by itself; a style sheet overrides attributes.
STYLE = _STYLE.replace(
    "DARKER", "\n  ".join(f'[fill="{a}"] {{ fill: {b}; }} [stroke="{a}"] {{ stroke: {b}; }}' for a, b in DARK.items())
)

SCRIPT = """
"use strict";
(() => {
  const all = (s, at = document) => [...at.querySelectorAll(s)];
  document.documentElement.classList.add("live");
  const tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true; document.body.append(tip);
  const show = (m) => {
    const box = m.getBoundingClientRect();
    tip.textContent = m.dataset.tip; tip.hidden = false;
    tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (box.top > tip.offsetHeight + 8 ? box.top - tip.offsetHeight - 6 : box.bottom + 6) + "px";
  };
  const hide = () => { tip.hidden = true; };
  for (const m of all("[data-tip]")) {
    all("title", m).forEach((t) => t.remove());
    m.addEventListener("mouseenter", () => show(m)); m.addEventListener("mouseleave", hide);
    m.addEventListener("focus", () => show(m)); m.addEventListener("blur", hide);
    m.addEventListener("click", () => show(m));
  }
  addEventListener("scroll", () => {
    const now = document.activeElement;
    if (!tip.hidden && now?.dataset?.tip === tip.textContent) show(now); else hide();
  }, true);
  addEventListener("keydown", (e) => {
    if (e.key === "Escape") hide();
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
    const now = document.activeElement;
    if (!step || !now || !now.dataset || !now.dataset.tip) return;
    const group = now.closest("[data-group]") || now.closest("svg");
    const marks = all("[data-tip]", group), next = marks[marks.indexOf(now) + step];
    if (next) { now.tabIndex = -1; next.tabIndex = 0; next.focus(); e.preventDefault(); }
  });
  const value = (row, i) => {
    const text = row.cells[i].dataset.value ?? row.cells[i].textContent;
    const n = parseFloat(text.replace(/,/g, ""));
    return Number.isNaN(n) ? text : n;
  };
  for (const table of all("table.sorts")) {
    all("thead th", table).forEach((th, i) => {
      const button = document.createElement("button");
      button.type = "button"; button.append(...th.childNodes); th.append(button);
      button.addEventListener("click", () => {
        const up = th.getAttribute("aria-sort") !== "ascending", body = table.tBodies[0];
        all("th", table).forEach((t) => t.removeAttribute("aria-sort"));
        th.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...body.rows].sort((a, b) => {
          const x = value(a, i), y = value(b, i);
          const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
          return up ? order : -order;
        });
        body.append(...rows);
      });
    });
  }
  for (const input of all("input[data-filters]")) {
    const table = document.getElementById(input.dataset.filters);
    input.addEventListener("input", () => {
      const words = input.value.toLowerCase().split(" ").filter(Boolean);
      for (const row of table.tBodies[0].rows)
        row.hidden = !words.every((w) => row.textContent.toLowerCase().includes(w));
    });
  }
})();
"""

_LONG = 44  # characters, from which a cell may wrap
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def shell(title: str, body: Sequence[str], *, script: bool = True) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: markup.
        script: whether tables sort and marks have tips.
    """
    name = escape(title)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        f"<title>{name}</title><style>{STYLE}</style></head><body><main><h1>{name}</h1>",
        *body, "</main>", f"<script>{SCRIPT}</script>" if script else "", "</body></html>",
    ]  # fmt: skip
    return "\n".join(p for p in parts if p) + "\n"


def sections(package: ModuleType, found: Mapping[str, Any]) -> list[str]:
    """Return the markup that every section of a package makes of `found`, in order."""
    names = [m.name for m in pkgutil.iter_modules(package.__path__)]
    modules = [importlib.import_module(f"{package.__name__}.{n}") for n in names]
    texts = [m.section(found) for m in sorted(modules, key=lambda m: m.ORDER)]
    return [t for t in texts if t]


def identifier(prefix: str, name: str) -> str:
    """Return a table's name in the page.

    >>> identifier("wins", "org/small v2")
    'wins-org-small-v2'
    """
    return f"{prefix}-" + "".join(c if c.isalnum() else "-" for c in name)


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", *, name: str = "", raw: Sequence[int] = ()
) -> str:
    """Return a table that can be sorted, with a filter if it has a name.

    Args:
        head: titles.
        rows: texts of the cells.
        caption: what it shows.
        name: identifier on the page.
        raw: columns whose cells are markup, the `td` included.
    """
    lines = "".join("<tr>" + "".join(c if i in raw else _cell(c) for i, c in enumerate(row)) + "</tr>" for row in rows)
    filters = (
        f'<p class="filter"><label>Show rows with <input type="search" data-filters="{name}"></label></p>'
        if name else ""
    )  # fmt: skip
    titles = "".join(f'<th scope="col">{broken(t)}</th>' for t in head)
    label = f"<caption><span>{escape(caption)}</span></caption>" if caption else ""
    mark = f' id="{name}"' if name else ""
    return (
        f'{filters}<div class="wide" tabindex="0" role="group" aria-label="{escape(caption or "table")}">'
        f'<table class="sorts"{mark}>{label}<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    return f"<td class=words>{broken(text)}</td>" if len(text) > _LONG else f"<td>{broken(text)}</td>"


def broken(name: str) -> str:
    """Mark a name up so that it may break behind dots, dashes and the like where the page is narrow.

    >>> broken("mlp.up_proj"), broken("1.5e-3")
    ('mlp.<wbr>up_<wbr>proj', '1.5e-3')
    """
    return "<wbr>".join(map(escape, re.split(r"(?<=[._/:])(?=[^\W\d_])|(?<=[._/:])(?=\d+[._/:])", name)))


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Return cards: a word, the figure in large type, and a line below it."""
    return '<ul class="cards">' + "".join(
        f'<li>{escape(word)}<b>{escape(value)}</b><span class="dim">{escape(note)}</span></li>'
        for word, value, note in items
    ) + "</ul>"  # fmt: skip


def plus_minus(mean: float | None, stderr: float | None, digits: int = 4) -> str:
    """Format a figure and its error as `0.1234 ± 0.0012`, leaving out a part that is missing."""
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + (f" ± {stderr:.{digits}f}" if stderr is not None else "")
