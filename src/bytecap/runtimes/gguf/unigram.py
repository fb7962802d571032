"""Unigram tokenizers as llama.cpp's `t5` tokenizer: pieces with scores, searched for the most likely cut.

llama.cpp normalizes by SentencePiece's table of characters, may merge spaces, and puts one in front. What a
`tokenizer.json` says beyond that has no counterpart and is refused by name.

>>> rules_of({"model": {}, "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never"}})
Rules(characters=None, prefix=False, merged=False)
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from typing import Any

_SPACES = re.compile(r"^( |▁|\\s)\{2,\}$")  # patterns of runs of spaces


@dataclass(frozen=True)
class Rules:
    """The treatment of text before pieces are sought.

    Attributes:
        characters: SentencePiece's compiled table, or None.
        prefix: whether text begins with a space.
        merged: whether runs of spaces are one, and none are left at the ends.
    """

    characters: bytes | None
    prefix: bool
    merged: bool


def rules_of(found: dict[str, Any]) -> Rules | str:
    """Rules of a unigram `tokenizer.json`, or the name of the part that llama.cpp has no counterpart of."""
    if found["model"].get("byte_fallback"):
        return "byte_fallback"
    characters, merged, split = None, False, False
    for step in _steps(found.get("normalizer"), "normalizers"):
        pattern = str((step.get("pattern") or {}).get("Regex", ""))
        if step["type"] == "Precompiled" and characters is None and not merged:
            characters = base64.b64decode(step["precompiled_charsmap"])
        elif step["type"] == "Replace" and _SPACES.match(pattern) and step.get("content") in {" ", "▁"}:
            merged = True
        elif step["type"] != "Strip":
            return f"normalizer {step['type']} {pattern}".strip()
    prefix = None
    for step in _steps(found.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "WhitespaceSplit" and characters is not None and not split:
            split = True  # the table makes spaces of all white space
        elif step["type"] == "Metaspace" and step.get("replacement") == "▁" and prefix is None:
            prefix = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        else:
            return f"pre_tokenizer {step['type']}"
    if prefix is None:
        return "pre_tokenizer without Metaspace"
    return Rules(characters, bool(prefix), merged or split)


def _steps(rule: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """A rule's steps, however deep they are."""
    if rule is None:
        return []
    return [s for r in rule[name] for s in _steps(r, name)] if rule["type"] == "Sequence" else [rule]


def write_rules(writer: Any, rules: Rules) -> None:
    """Write the keys of a unigram tokenizer besides its tokens."""
    writer.add_add_space_prefix(rules.prefix)
    writer.add_remove_extra_whitespaces(rules.merged)
    if rules.characters is not None:
        writer.add_precompiled_charsmap(rules.characters)
