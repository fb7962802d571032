"""Compose the folder of a page that runs a model: its files, and a ledger of every byte that a visitor downloads.

Everything but the model is fixed before the model is fitted, numbers that are not known yet at their longest, so the
model's budget is what the cap leaves. All files of the folder count, the licence and the ledger itself too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from bytecap.runtimes.web.runtime import NAME, Runtime, page_file

MODEL, LEDGER = "model.gguf", "ledger.json"
SCRIPT, WASM, LICENCE = "wllama.js.pack", "wllama.wasm.pack", "wllama.LICENCE.txt"
PAGE = ("index.html", "app.js", "sw.js")
OWNERS = {MODEL: "model", SCRIPT: "runtime", WASM: "runtime", LICENCE: "runtime", LEDGER: "ledger"}
_UNKNOWN = "0" * 64


@dataclass(frozen=True)
class Site:
    """A page before its model is there.

    Attributes:
        title: the model's name.
        context: most tokens of prompt and text together.
        budget: cap on all files in bytes.
        runtime: what runs the model.
        chat: texts around the messages of a conversation (`bytecap.pipeline.chat_form`); None where there is none.
    """

    title: str
    context: int
    budget: int
    runtime: Runtime
    chat: Mapping[str, Any] | None = None

    @property
    def fixed(self) -> int:
        """Most bytes of everything but the model."""
        return sum(map(len, self.files(self.budget, _UNKNOWN).values()))

    def files(self, size: int, digest: str) -> dict[str, bytes]:
        """Return every file but the model.

        Args:
            size: of the model in bytes.
            digest: its SHA-256.
        """
        runtime = self.runtime
        found = {SCRIPT: runtime.script, WASM: runtime.wasm, LICENCE: runtime.licence}
        downloads = [_described(n, d) for n, d in found.items() if n != LICENCE]
        downloads.append({"name": MODEL, "bytes": size, "sha256": digest})
        about = f"{NAME} {runtime.version}"
        made: dict[str, Any] = {"title": self.title, "context": self.context, "runtime": about, "files": downloads}
        if self.chat is not None:
            made["chat"] = dict(self.chat)
        parts = {"{{TITLE}}": escape(self.title), "{{MADE}}": _inside(made)}
        page = re.sub("|".join(parts), lambda m: parts[m[0]], page_file("index.html").decode())
        found |= {"index.html": page.encode(), **{n: page_file(n) for n in PAGE[1:]}}
        return found | {LEDGER: self._ledger(found, size, digest)}

    def _ledger(self, files: Mapping[str, bytes], size: int, digest: str) -> bytes:
        """Return the ledger, whose own size is in it."""
        lines = [{**_described(n, d), "owner": OWNERS.get(n, "page")} for n, d in sorted(files.items())]
        lines.append({"name": MODEL, "bytes": size, "sha256": digest, "owner": "model"})
        own, data = 0, b""
        for _ in range(8):
            total = sum(int(line["bytes"]) for line in lines) + own
            found: dict[str, Any] = {
                "budget_bytes": self.budget, "total_bytes": total, "runtime": f"{NAME} {self.runtime.version}",
                "runtime_integrity": self.runtime.integrity,
                "files": [*lines, {"name": LEDGER, "bytes": own, "owner": "ledger"}],
            }  # fmt: skip
            data = json.dumps(found, indent=1).encode()
            if len(data) == own:
                break
            own = len(data)
        return data


def _described(name: str, data: bytes) -> dict[str, Any]:
    """Return name, size and hash of a file."""
    return {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _inside(value: Mapping[str, Any]) -> str:
    r"""Write JSON that cannot end the element it stands in, whatever its texts are.

    >>> print(_inside({"title": "</script>"}))
    {"title": "\u003c/script>"}
    """
    return json.dumps(value).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
