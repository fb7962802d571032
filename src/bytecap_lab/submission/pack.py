"""Pack a script, its helper modules and perhaps a decoder into one self-extracting file of plain ASCII.

Two lines: `base64` and a decompressor of the standard library turn a text into sources, the first of which runs the
rest. The script runs as `__main__` in the file's own module, so arguments, `__file__`, worker processes and pickles
are as they were; its source can be inspected (compilers of kernels do). Helper modules come out of an importer.

The hook is one line of the script, `from bytecap import load`: with a vendored decoder it becomes an import of that.

What it omits: packages beside the script (single modules only), and data: whatever else is read must lie beside it.
"""

from __future__ import annotations

import ast
import base64
import lzma
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from bytecap.errors import CodeError
from bytecap.format import codefiles
from bytecap.pipeline import pack_code
from bytecap.pipeline.minify import minified, parse
from bytecap_lab.submission import vendor

TYPICAL = frozenset({2, 3, 9, 15})  # coders of what the default method makes: vector, exact for buffers, both trellises
DECODER = "bcap_decoder"
_MOST = 1 << 26  # characters that a packed script may unpack to
_RUN = """import linecache
linecache.cache[__file__]=len(s[1]),None,s[1].splitlines(True),__file__
exec(compile(s[1],__file__,"exec"))"""
_IMPORTER = """import importlib.abc,importlib.util,sys
class Packed(importlib.abc.ExecutionLoader):
	sources=dict(zip(s[2::2],s[3::2]))
	def find_spec(self,name,*_):
		if name in self.sources:return importlib.util.spec_from_loader(name,self)
	def get_filename(self,name):return name+".py"
	def get_source(self,name):return self.sources[name]
sys.meta_path.insert(0,Packed())
"""


@dataclass(frozen=True)
class Script:
    """A packed script.

    Attributes:
        data: the file.
        raw: bytes of its sources as they were given.
        decoder: bytes of the file that the vendored decoder takes; 0 without one.
        modules: names of the packed modules, the script first.
    """

    data: bytes
    raw: int
    decoder: int
    modules: tuple[str, ...]


def gather(path: Path) -> dict[str, bytes]:
    """Gather a script and the modules beside it that it imports, directly or not; returns contents by file name.

    Raises:
        CodeError: a file cannot be read or parsed, or a package is imported from beside the script.
    """
    found, wanted = dict[str, bytes](), [path]
    while wanted:
        file = wanted.pop(0)
        if file.name in found:
            continue
        found[file.name] = pack_code.read(file)
        for name, line in imports(parse(found[file.name], str(file))[1]).items():
            if (path.parent / name / "__init__.py").is_file():
                raise CodeError(
                    f"{file}, line {line}: imports the package {name} beside it; only modules can be packed"
                )
            if (beside := path.parent / f"{name}.py").is_file():
                wanted.append(beside)
    return found


def imports(tree: ast.Module) -> dict[str, int]:
    r"""Return the names of the modules that a program imports, up to the first dot, and the line of each.

    >>> imports(ast.parse("import numpy as np\nfrom bytecap.format import ledger"))
    {'numpy': 1, 'bytecap': 2}
    """
    found: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""] if not node.level else []
        else:
            continue
        for name in names:
            found.setdefault(name.partition(".")[0], node.lineno)
    return found


def pack(sources: Mapping[str, bytes], *, vendored: bool, used: Collection[int] = TYPICAL) -> Script:
    """Pack a script.

    Args:
        sources: contents by file name, the script first, see `gather`.
        vendored: carry a decoder; else the script imports bytecap.
        used: coders and layers of the decoder, see `vendor.tags`.

    Raises:
        CodeError: a source does not parse, or none says `from bytecap import load`.
    """
    trees = {name: parse(content, name)[1] for name, content in sources.items()}
    hooks = _Hook(DECODER if vendored else "bytecap")
    for name, tree in trees.items():
        hooks.file = name
        ast.fix_missing_locations(hooks.visit(tree))
    script = next(iter(sources))
    if not hooks.found:
        raise CodeError(f"{script} never says `from bytecap import load`, the line that reads model.bcap")
    texts = {Path(name).stem: minified(ast.unparse(tree), name) for name, tree in trees.items()}
    plain = _file(texts, brotli=not vendored)
    data = _file(texts | {DECODER: vendor.decoder(used)}) if vendored else plain
    return Script(data, sum(map(len, sources.values())), len(data) - len(plain), tuple(texts))


def unpacked(text: str) -> dict[str, str]:
    """Unpack a script to sources by module name, the script first as `__main__`; empty if it is not a packed one.

    Nothing is executed.

    Raises:
        CodeError: the file begins as a packed one and is damaged.
    """
    head, _, rest = text.partition('(base64.b85decode("')
    line, _, call = head.partition("\n")
    if line not in {"import base64,lzma", "import base64,zlib", "import base64,brotli"} or not call.startswith("s="):
        return {}
    try:
        data = base64.b85decode(rest.partition('"')[0])
        if line.endswith("brotli"):
            raw = codefiles.unpack("the script", b"\1" + data)
        elif line.endswith("zlib"):
            raw = zlib.decompressobj().decompress(data, _MOST)
        else:
            raw = lzma.LZMADecompressor().decompress(data, _MOST)
        _, script, *more = raw.decode().split("\0")
    except (ValueError, lzma.LZMAError, zlib.error) as exc:
        raise CodeError(f"the packed script is damaged: {exc}") from exc
    return {"__main__": script} | dict(zip(more[::2], more[1::2], strict=True))


class _Hook(ast.NodeTransformer):
    """Points `from bytecap import load` to where `load` is."""

    def __init__(self, target: str) -> None:
        self.target, self.file, self.found = target, "", 0

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | list[ast.stmt]:
        """Redirect `load`; other names stay imports of bytecap."""
        if node.level or node.module not in {"bytecap", DECODER}:
            return node
        loads = [a for a in node.names if a.name == "load"]
        others = [a for a in node.names if a.name != "load"]
        self.found += len(loads)
        statements: list[ast.stmt] = [ast.ImportFrom(self.target, loads, 0)] if loads else []
        return statements + ([ast.ImportFrom(node.module, others, 0)] if others else [])

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Redirect `bytecap.load`, which would need bytecap."""
        self.generic_visit(node)
        if node.attr == "load" and isinstance(node.value, ast.Name) and node.value.id == "bytecap":
            raise CodeError(
                f"{self.file}, line {node.lineno}: bytecap.load cannot be packed; write `from bytecap import load`"
            )
        return node


def _file(texts: Mapping[str, str], *, brotli: bool = False) -> bytes:
    """Return the shortest file that runs the first text with the others as modules."""
    (_, script), *modules = texts.items()
    boot = _IMPORTER + _RUN if modules else _RUN
    raw = "\0".join([boot, script, *(part for module in modules for part in module)]).encode()
    tries = [("zlib", zlib.compress(raw, 9))]
    for lc in range(5):
        options = {"id": lzma.FILTER_LZMA1, "preset": 9 | lzma.PRESET_EXTREME, "lc": lc, "lp": 0, "pb": 0}
        options["dict_size"] = max(len(raw), 1 << 12)
        tries.append(("lzma", lzma.compress(raw, lzma.FORMAT_ALONE, filters=[options])))
    if brotli:  # bytecap brings it along
        from brotli import compress

        tries.append(("brotli", compress(raw, quality=11)))
    name, data = min(tries, key=lambda t: len(t[1]))
    text = base64.b85encode(data).decode()
    line = f's={name}.decompress(base64.b85decode("{text}")).decode().split("\\0");exec(s[0])\n'
    return f"import base64,{name}\n{line}".encode()
