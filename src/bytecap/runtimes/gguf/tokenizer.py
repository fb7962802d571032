"""A tokenizer as llama.cpp wants it: tokens, types, merges or scores, and the name of its pre-tokenizer.

llama.cpp splits text before byte-level BPE by one of its built-in rules, found by name. The name follows from the rule
in `tokenizer.json`; one that is not in the list below cannot be named and needs a template. BPE over SentencePiece
pieces with byte fallback becomes llama.cpp's `llama` tokenizer, whose scores are the order of the merges.
Unigram models are its `t5` tokenizer (`unigram`). Omitted: WordPiece and words, which no causal model uses.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from bytecap.errors import CheckpointError
from bytecap.model.checkpoint import Model
from bytecap.runtimes.gguf import library
from bytecap.runtimes.gguf.unigram import rules_of, write_rules

_TYPES = ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED", "BYTE", "UNKNOWN")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_LLAMA3 = _WORDS + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_RULES = {
    "gpt-2": (), "llama-bpe": (_LLAMA3,), "qwen2": (_LLAMA3.replace("{1,3}", ""),), "smollm": ("digits",)
}  # fmt: skip
_ADVICE = "give a file converted by llama.cpp with --template"


def write_tokenizer(writer: Any, model: Model) -> None:
    """Write the tokenizer of a model.

    Raises:
        CheckpointError: it has none, or llama.cpp has no name for it.
    """
    if "tokenizer.json" not in model.files:
        raise CheckpointError(f"{model.name} has no tokenizer.json, and a GGUF file must hold a tokenizer")
    found = json.loads(model.files["tokenizer.json"])
    kind = found["model"].get("type")
    if kind == "Unigram":
        _write_unigram(writer, model, found)
        return
    if kind != "BPE":
        raise CheckpointError(f"llama.cpp has no tokenizer for the {kind} model of {model.name}: {_ADVICE}")
    pieces = bool(found["model"].get("byte_fallback"))
    writer.add_tokenizer_model("llama" if pieces else "gpt2")
    writer.add_tokenizer_pre("default" if pieces else pre_tokenizer(found, model.name))
    names, types = _tokens(found, _size(model), pieces)
    writer.add_token_list(names)
    writer.add_token_types(types)
    if pieces:
        writer.add_token_scores(_scores(found, names))
        writer.add_add_space_prefix("Prepend" in json.dumps(found.get("normalizer")) or _prepends(found))
    _write_special(writer, model, len(names), merges=not pieces)


def _write_unigram(writer: Any, model: Model, found: dict[str, Any]) -> None:
    rules = rules_of(found)
    if isinstance(rules, str):
        raise CheckpointError(f"llama.cpp has no tokenizer like the Unigram one of {model.name} ({rules}): {_ADVICE}")
    writer.add_tokenizer_model("t5")
    writer.add_tokenizer_pre("default")
    pieces = found["model"]["vocab"]
    named = {**found, "model": {"vocab": {p: i for i, (p, _) in enumerate(pieces)}}}
    unknown = found["model"].get("unk_id")
    if unknown is not None:
        named["model"]["unk_token"] = pieces[unknown][0]
    names, types = _tokens(named, _size(model), False)
    if unknown is not None:
        types[unknown] = int(library().TokenType.UNKNOWN)
        writer.add_unk_token_id(unknown)
    writer.add_token_list(names)
    writer.add_token_types(types)
    writer.add_token_scores([float(s) for _, s in pieces] + [0.0] * (len(names) - len(pieces)))
    write_rules(writer, rules)
    _write_special(writer, model, len(names), merges=False, left=("unk",))


def _size(model: Model) -> int:
    return int(model.module.config.vocab_size)  # type: ignore[union-attr, arg-type]


def _write_special(writer: Any, model: Model, size: int, *, merges: bool, left: tuple[str, ...] = ()) -> None:
    """Write merges, special tokens (but those `left` out) and whether texts begin or end with them."""
    with tempfile.TemporaryDirectory() as name:
        for file in ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"):
            if file in model.files:
                (Path(name) / file).write_bytes(model.files[file])
        special = library().SpecialVocab(name, load_merges=merges, n_vocab=size)
    for kind in left:
        special.special_token_ids.pop(kind, None)
        special.add_special_token.setdefault("eos", False)  # llama.cpp's own default differs by tokenizer
    special.add_to_gguf(writer, quiet=True)


def _prepends(found: dict[str, Any]) -> bool:
    rule = found.get("pre_tokenizer") or {}
    return rule.get("type") == "Metaspace" and rule.get("prepend_scheme") != "never"


def pre_tokenizer(found: dict[str, Any], name: str) -> str:
    """llama.cpp's name of the rule by which a byte-level tokenizer splits text.

    >>> pre_tokenizer({"pre_tokenizer": {"type": "ByteLevel", "use_regex": True}}, "x")
    'gpt-2'

    Raises:
        CheckpointError: there is none.
    """
    rule = found.get("pre_tokenizer") or {}
    steps = rule.get("pretokenizers", [rule])
    last = steps[-1] if steps else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space") or found.get("normalizer") not in _NORMAL:
        raise CheckpointError(f"llama.cpp has no tokenizer like that of {name} ({rule.get('type')}): {_ADVICE}")
    before = tuple(
        "digits" if s.get("type") == "Digits" and s.get("individual_digits") else s.get("pattern", {}).get("Regex", "?")
        for s in steps[:-1]
    )
    whole = bool(last.get("use_regex", True))  # GPT-2's rule after the others
    for named, patterns in _RULES.items():
        if before == patterns and whole == (named in {"gpt-2", "smollm"}):
            return named
    raise CheckpointError(f"llama.cpp has no name for the rule by which {name} splits text ({before}): {_ADVICE}")


_NORMAL = (None, {"type": "NFC"})


def _tokens(found: dict[str, Any], size: int, pieces: bool) -> tuple[list[str], list[int]]:
    """Text and type of every token; ids without a token are padding."""
    code = {n: int(getattr(library().TokenType, n)) for n in _TYPES}
    names = [f"[PAD{i}]" for i in range(size)]
    types = [code["UNUSED"]] * size
    for text, i in found["model"]["vocab"].items():
        byte = pieces and len(text) == 6 and text.startswith("<0x")
        names[i], types[i] = text, code["BYTE" if byte else "NORMAL"]
    for token in found.get("added_tokens", ()):
        unknown = token["content"] == found["model"].get("unk_token")
        kind = "UNKNOWN" if unknown else "CONTROL" if token["special"] else "USER_DEFINED"
        names[token["id"]], types[token["id"]] = token["content"], code[kind]
    return names, types


def _scores(found: dict[str, Any], names: list[str]) -> list[float]:
    """Minus the place of the first merge that makes a token; tokens that no merge makes come last."""
    merges = found["model"]["merges"]
    first: dict[str, int] = {}
    for place, merge in enumerate(merges):
        first.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1), place)
    return [-float(first.get(n, len(merges))) for n in names]
