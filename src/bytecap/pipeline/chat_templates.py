"""Put conversations into a model's chat template.

Chat templates are programs that come with a model. They run in transformers' sandbox (`ImmutableSandboxedEnvironment`)
and nowhere else, in a process of its own with limits on time and memory, over a plain tokenizer that is built there:
no class that a config names is ever looked up. Nothing here imports torch, which that process has no use for.

>>> template_of({"chat_template.jinja": b"{{ messages }}"})
'{{ messages }}'
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bytecap.errors import ArtifactError
from bytecap.model.apart import call_apart
from bytecap.model.building import quiet

_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
_ASKED, _RENDERED = "asked.json", "rendered.txt"
_TEMPLATE_MEMORY, _MOST_RENDERED = 1 << 32, 1 << 24  # bytes


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the tokenizer's special tokens by name, such as `eos_token`."""
    found: dict[str, str] = {}
    for source in (json_of(files, "special_tokens_map.json"), json_of(files, "tokenizer_config.json")):
        for key in _SPECIAL:
            value = source.get(key)
            value = value.get("content") if isinstance(value, dict) else value
            if isinstance(value, str):
                found[key] = value
    return found


def conversation(files: Mapping[str, bytes], name: str, messages: list[dict[str, str]]) -> str:
    """Put messages into the model's chat template, up to where the model begins to speak.

    Raises:
        ArtifactError: there is no template, or it fails.
    """
    return conversations(files, name, [messages])[0]


def conversations(files: Mapping[str, bytes], name: str, talks: Sequence[list[dict[str, str]]]) -> list[str]:
    """Do what `conversation` does for several of them, in one process."""
    template = template_of(files)
    if template is None:
        raise ArtifactError(f"{name} has no chat template: leave --chat out, and the prompt is continued as it is")
    asked = {"template": template, "talks": list(talks), "special": special_tokens(files)}
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / _ASKED).write_text(json.dumps(asked), "utf-8")
        why = call_apart(render, Path(directory), memory=_TEMPLATE_MEMORY)
        made = Path(directory) / _RENDERED
        if not why and not made.is_file():
            why = "no process could be started for it"
        if why:
            raise ArtifactError(f"the chat template of {name} cannot be rendered: {why}")
        if made.stat().st_size > _MOST_RENDERED:
            raise ArtifactError(f"the chat template of {name} writes {made.stat().st_size:,} bytes for a few words")
        return list(map(str, json.loads(made.read_bytes())))


def render(directory: str) -> None:
    """Put the conversations of a directory's file into its template, which is a program; in a process of its own."""
    import tokenizers
    import transformers

    quiet()
    asked = json.loads((Path(directory) / _ASKED).read_text("utf-8"))
    plain: Any = transformers.PreTrainedTokenizerFast
    tokenizer = plain(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), **asked["special"])
    template = {"chat_template": asked["template"], "tokenize": False, "add_generation_prompt": True}
    texts = [str(tokenizer.apply_chat_template(talk, **template)) for talk in asked["talks"]]
    (Path(directory) / _RENDERED).write_text(json.dumps(texts, ensure_ascii=False), "utf-8", newline="")


def template_of(files: Mapping[str, bytes]) -> str | None:
    """Return the chat template, from its own file or the tokenizer's config (of several, the default)."""
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8", "replace")
    found = json_of(files, "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def json_of(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return a side file's JSON object, empty where there is none."""
    try:
        found = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
