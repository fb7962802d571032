r"""Check the names under which side and code files may be written out, on any system.

A name comes from whoever made the artifact, so it must mean one new file in the directory and nothing else: no path, no
device, no stream of another file, not a second spelling of a file beside it, and nothing that takes the place of the
weights. The rule is the same on every system (format.md, 4), so that what `check` calls sound can be unpacked anywhere.

>>> fault("tokenizer.json") is None, fault("aux.json"), fault("a\u202egpj.exe")
(True, 'names a device on Windows', 'holds characters that cannot be seen')
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from bytecap.errors import CorruptError

WEIGHTS = "model.safetensors"  # what the reader itself writes
MAX_BYTES = 255  # what file systems take
_SHORT_STEM = 8
_DEVICES = {"CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$"} | {
    port + digit for port in ("COM", "LPT") for digit in "0123456789¹²³"
}
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories: controls, directions, separators
_WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".gguf",
    ".onnx", ".npz", ".bcap",
)  # fmt: skip  # files that programs read weights from, or where to find them, instead of those of the artifact
_SHORT = re.compile(r"[^.~]{1,7}~[0-9]{1,6}(\.[^.]{1,3})?")  # what Windows calls files of longer names besides
_REDIRECT = {"adapter_config.json"}  # loads another model's weights


def same(name: str) -> str:
    """Fold a name as file systems do that ignore case, or the composition of letters."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def fault(name: str) -> str | None:
    """Say why no file may be written under a name, or None."""
    plain = same(name)
    if not name or name[0] == "." or set(name) & set('/\\:<>"|?*') or name[-1] in ". ":
        return "is no plain name of a file on every system"
    if any(unicodedata.category(c) in _UNSEEN for c in name):
        return "holds characters that cannot be seen"
    if len(name.encode("utf-8")) > MAX_BYTES:
        return f"is longer than {MAX_BYTES} bytes"
    if name.partition(".")[0].rstrip(" ").upper() in _DEVICES:
        return "names a device on Windows"
    if plain.endswith(_WEIGHTS) or plain in _REDIRECT:
        return "would stand for the weights"
    short = _SHORT.fullmatch(name) and len(name.partition(".")[0]) <= _SHORT_STEM
    return "may be the short name of another file on Windows" if short else None


def problem(names: Iterable[str]) -> str | None:
    """Say why files cannot be written under these names together, or return None."""
    seen: dict[str, str] = {}
    for name in names:
        if why := fault(name):
            return f"a side file must not have the name {name[:MAX_BYTES]!r}, which {why}"
        if other := seen.get(same(name)):
            return f"the side files {other!r} and {name!r} are one file where case does not count"
        seen[same(name)] = name
    return None


def check(names: Iterable[str]) -> None:
    """Refuse names that files must not be written under.

    Raises:
        CorruptError: a name has a fault, or two are one on a system that ignores case.
    """
    if said := problem(names):
        raise CorruptError(said)
