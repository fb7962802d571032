"""Read wllama, llama.cpp compiled to WebAssembly, from its npm package.

Its binaries are no part of this project: the package is a file of the user's, or npm fetches it, and then its hash must
be the one written here. Of the two builds it holds the one with a single thread is taken: the other runs only where the
server sends headers (COOP and COEP) that a plain static server does not send.

JavaScript and WebAssembly are stored gzipped under a name that no server knows, and the page unpacks them, so that a
visitor downloads a third of their bytes whatever the server does.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bytecap.errors import OutputError, UsageError
from bytecap.system.atomic import read_regular

NAME, VERSION = "@wllama/wllama", "2.3.7"
INTEGRITY = "sha512-T273gBEqEZCHAoyNZDg+X6boQWktaq+efNF6bJo5aHToJr7jS1kCYImKXDdBi2/CccRuBUcMBHHLHiQN4+OfKQ=="
_MEMBERS = {
    "about": ("package/package.json",),
    "script": ("package/esm/index.min.js", "package/esm/index.js"),
    "wasm": ("package/esm/single-thread/wllama.wasm",),
    "licence": ("package/LICENCE", "package/LICENSE"),
}
_MOST_MEMBER = 64 << 20  # bytes of one file of the package
_MOST_PACKAGE = 512 << 20  # bytes of a package, unpacked
_SECONDS = 300  # that npm may take


@dataclass(frozen=True)
class Runtime:
    """The files of a runtime, as a folder holds them.

    Attributes:
        version: of the package.
        integrity: hash of the package in npm's form.
        script: JavaScript module, gzipped.
        wasm: WebAssembly, gzipped.
        licence: of the runtime.
    """

    version: str
    integrity: str
    script: bytes
    wasm: bytes
    licence: bytes


def integrity_of(data: bytes) -> str:
    """Return the hash of a package in npm's form.

    >>> integrity_of(b"")[:20]
    'sha512-z4PhNX7vuL3xV'
    """
    return f"sha512-{base64.b64encode(hashlib.sha512(data).digest()).decode()}"


def read_runtime(path: Path | str | None) -> Runtime:
    """Read a runtime from a package file, or have npm fetch the one whose hash is known.

    Raises:
        UsageError: the file is no such package, or npm is missing or fails.
    """
    if path is None:
        data = _fetched()
        if integrity_of(data) != INTEGRITY:
            raise UsageError(
                f"the package {NAME} {VERSION} that npm fetched is another one than this version of bytecap knows: its "
                f"hash is {integrity_of(data)}, not {INTEGRITY}"
            )
        return parse_package(data, f"{NAME} {VERSION}")
    try:
        data = read_regular(Path(path))
    except OSError as exc:
        raise UsageError(f"cannot read the runtime {path}: {exc.strerror}") from exc
    return parse_package(data, str(path))


def _fetched() -> bytes:
    """Return the package's bytes, fetched by npm."""
    npm, spec = shutil.which("npm"), f"{NAME}@{VERSION}"
    other = f"give a package that `npm pack {spec}` made elsewhere with --runtime FILE.tgz"
    if npm is None:
        raise UsageError(f"the browser's runtime is fetched by npm, which is not installed here: {other}")
    with tempfile.TemporaryDirectory(prefix="bytecap-") as place:
        command = [npm, "pack", spec, "--silent", "--ignore-scripts", "--pack-destination", place]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=_SECONDS, cwd=place)  # noqa: S603
            return next(Path(place).glob("*.tgz")).read_bytes()
        except (OSError, subprocess.SubprocessError, StopIteration) as exc:
            said = (getattr(exc, "stderr", b"") or b"").decode(errors="replace").strip().splitlines()
            reason = f": {said[-1]}" if said else ""
            raise UsageError(f"npm could not fetch {spec}{reason}; {other}") from exc


def parse_package(data: bytes, name: str) -> Runtime:
    """Take the runtime's files out of a package; no other file of it is unpacked.

    Args:
        data: of a gzipped tar file.
        name: of the package, for messages.

    Raises:
        UsageError: it is no package of this runtime, or not of a version that the page can drive.
    """
    wanted = {m: kind for kind, names in _MEMBERS.items() for m in names}
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as package:
            for member in package:
                if member.offset > _MOST_PACKAGE:
                    raise UsageError(f"{name} holds more than {_MOST_PACKAGE:,} bytes: no such runtime is as large")
                if member.name in wanted and member.isfile() and member.size <= _MOST_MEMBER:
                    content = package.extractfile(member)
                    found[member.name] = content.read() if content is not None else b""
    except (tarfile.TarError, OSError, EOFError, ValueError) as exc:
        raise UsageError(f"{name} is no npm package (a gzipped tar file): {exc}") from exc
    parts = {kind: next((found[m] for m in names if m in found), b"") for kind, names in _MEMBERS.items()}
    version = _version(parts["about"], name)
    for kind, names in _MEMBERS.items():
        if not parts[kind]:
            raise UsageError(f"{name} lacks {names[0]}: take {NAME}@{VERSION}")
    script, wasm = (gzip.compress(parts[k], 9, mtime=0) for k in ("script", "wasm"))
    return Runtime(version, integrity_of(data), script, wasm, parts["licence"])


def _version(about: bytes, name: str) -> str:
    """Return the version of a package; refuses other packages and versions with another interface."""
    try:
        described = json.loads(about)
        package, version = str(described["name"]), str(described["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise UsageError(f"{name} is no package of {NAME}: it has no readable package.json") from exc
    if package != NAME or version.partition(".")[0] != VERSION.partition(".")[0]:
        raise UsageError(
            f"{name} is {package[:80]} {version[:40]}; the page runs {NAME} {VERSION.partition('.')[0]}.x: make one "
            f"with `npm pack {NAME}@{VERSION}`"
        )
    return version


def page_file(name: str) -> bytes:
    """Return one of the page's own files."""
    try:
        return (Path(__file__).parent / "page" / name).read_bytes()
    except OSError as exc:
        raise OutputError(f"bytecap's own file {name} cannot be read: {exc.strerror}; install it anew") from exc
