"""Generate a decoder that is small enough to travel with a submission, from the reference decoder's source.

`bytecap.reference` needs numpy alone. Here its modules are joined into one program, cut down to the coders and layers
that a file uses, stripped of messages and annotations, and minified. What it computes stays what the reference
computes, check by check; only its errors are all plain `ValueError`.

What it omits: nothing is removed but what no coder of the file reaches, so a file of another model may need another
decoder.
"""

from __future__ import annotations

import ast
import symtable
from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache
from importlib import resources

from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.container import Contents
from bytecap.pipeline.minify import crushed

DEFAULT = frozenset({1, 2, 3, 9, 15})  # grid, vector, exact, trellis, long_trellis
OBJECTS = -1  # stands among the coders for shared objects, which only some of them can refer to
_PACKAGE = "bytecap.reference"
_ERRORS = {"CorruptError", "NotAnArtifact", "VersionError"}
_TABLES = {"CODERS", "OVERLAYS"}
_REFERRING = frozenset({5, 6, 7})  # stack, codebook, latent
_WITHOUT_OBJECTS = {
    "read_objects": "def read_objects(sections): require(not sections)",
    "all_used": "def all_used(objects): return True",
}
_REPEATING = frozenset({5, 7})  # stack and latent, without which no file breaks the bound of work
_UPDATES = frozenset({16, 41})  # base, difference
_WITHOUT_BASE = "def decode_file(data): return _decode_part(_checked(data), {})"
_WITHOUT_WORK = "def check_work(units, bodies, size): require(all(u.coder in CODERS for u in units))"
_LOAD = """
def load(path):
    with open(path, "rb") as file:
        return decode_file(file.read())
"""


def tags(contents: Contents) -> frozenset[int]:
    """Return the coders and overlays that an artifact uses, and `OBJECTS` if it has shared objects."""
    found = {u.tag for u in contents.units} | ({OBJECTS} if contents.objects else set())
    for u in contents.units:
        if u.tag == STACK.tag:
            found |= set(STACK.tags(u.data))
    return frozenset(found)


def decoder(used: Collection[int] = DEFAULT) -> str:
    """Generate a module whose `load(path)` returns the arrays of an artifact by name, as `bytecap.load` does.

    Args:
        used: coders and layers to keep, see `tags`.
    """
    return _decoder(frozenset(used) | ({OBJECTS} if _REFERRING & set(used) else set()))


@cache
def _decoder(used: frozenset[int]) -> str:
    body = [node for module in _modules() for node in module]
    tree = ast.Module([*body, *ast.parse(_LOAD).body], [])
    tree = ast.fix_missing_locations(_Strip(used).visit(tree))
    tree.body = _reachable(tree.body, "load")
    return crushed(ast.unparse(_positional(tree)), "load")


# ------------------------------------------------------------------------------------------------ joining modules


def _modules() -> list[list[ast.stmt]]:
    """Return the bodies of the reference's modules in import order, with clashing names changed."""
    trees: dict[str, ast.Module] = {}
    _collect("__init__", trees)
    owned = {module: _own(tree) for module, tree in trees.items()}  # before names change
    counts = Counter(name for names in owned.values() for name in names)
    for module, tree in trees.items():
        new = {name: f"{name}_{module}" for name in owned[module] if counts[name] > 1}
        for node in _imports(tree):
            source = (node.module or "").rpartition(".")[2]
            there = {
                a: f"{a.name}_{source}" if a.name in owned[source] and counts[a.name] > 1 else a.name
                for a in node.names
            }
            new |= {a.asname or a.name: name for a, name in there.items()}
        _rename(tree, new)
    return [[n for n in tree.body if not _is_own_import(n)] for tree in trees.values()]


def _collect(module: str, trees: dict[str, ast.Module]) -> None:
    """Parse a module of the reference after those it imports from."""
    text = resources.files(_PACKAGE).joinpath(f"{module}.py").read_text("utf-8")
    tree = ast.parse(text)
    for node in _imports(tree):
        needed = (node.module or "").rpartition(".")[2]
        if needed not in trees:
            _collect(needed, trees)
    trees[module] = tree


def _imports(tree: ast.Module) -> list[ast.ImportFrom]:
    """Return the imports of other modules of the reference."""
    return [n for n in tree.body if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(_PACKAGE)]


def _is_own_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in {"bytecap", "__future__"}


def _own(tree: ast.Module) -> set[str]:
    """Return the names that a module defines; imports of libraries are the same everywhere."""
    return {name for n in tree.body if not isinstance(n, ast.Import | ast.ImportFrom) for name in _bound(n)}


def _rename(tree: ast.Module, new: dict[str, str]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.name = new.get(node.name, node.name)
        elif isinstance(node, ast.arg):
            node.arg = new.get(node.arg, node.arg)


# ------------------------------------------------------------------------------------------------------ cutting down


class _Strip(ast.NodeTransformer):
    """A transformer that removes messages, annotations and unused coders."""

    def __init__(self, used: frozenset[int]) -> None:
        self.used = used

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """Drop annotations, and the message that `require` takes."""
        if node.name == "require":
            return ast.parse("def require(condition):\n    if not condition: raise ValueError").body[0]
        if not _UPDATES & self.used:
            if node.name == "decode_file":
                return ast.parse(_WITHOUT_BASE).body[0]
            if node.name == "contents":
                _refuse_bases(node)
        if node.name in _WITHOUT_OBJECTS and OBJECTS not in self.used:
            return ast.parse(_WITHOUT_OBJECTS[node.name]).body[0]
        if node.name == "check_work" and not _REPEATING & self.used:
            return ast.parse(_WITHOUT_WORK).body[0]
        node.returns = None
        for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, node.args.vararg]:
            if arg is not None:
                arg.annotation = None
        self.generic_visit(node)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Keep the fields of named tuples without their types."""
        for i, field in enumerate(node.body):
            if isinstance(field, ast.AnnAssign):
                field.annotation = ast.Constant(0)
            else:
                node.body[i] = self.visit(field)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """Drop the annotations of variables."""
        return self.visit(ast.Assign([node.target], node.value)) if node.value is not None else None

    def visit_Assign(self, node: ast.Assign) -> ast.AST | None:
        """Drop unused coders from their tables."""
        target = node.targets[0]
        if isinstance(target, ast.Subscript) and _name(target.value) in _TABLES:
            return node if isinstance(target.slice, ast.Constant) and target.slice.value in self.used else None
        if _name(target) in _TABLES:
            self._keep(node.value)
        return self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST | None:
        """Drop unused coders from additions to their tables."""
        if _name(node.target) in _TABLES and not self._keep(node.value):
            return None
        return self.generic_visit(node)

    def _keep(self, value: ast.expr) -> bool:
        """Drop unused coders from a table; returns whether anything is left."""
        if not isinstance(value, ast.Dict):  # pragma: no cover (the reference has no other form)
            raise TypeError("a table of coders is no dictionary")
        pairs = [(k, v) for k, v in zip(value.keys, value.values, strict=True) if k.value in self.used]  # type: ignore[union-attr]
        value.keys, value.values = [k for k, _ in pairs], [v for _, v in pairs]
        return bool(pairs)

    def visit_If(self, node: ast.If) -> ast.AST | None:
        """Drop what is done for a base, where no unit refers to one."""
        if not _UPDATES & self.used and ast.unparse(node.test) in {"base", "part.base"}:
            return None
        return self.generic_visit(node)

    def visit_With(self, node: ast.With) -> ast.AST | list[ast.stmt]:
        """Drop `damage`, which only gives errors another class."""
        self.generic_visit(node)
        call = node.items[0].context_expr
        return node.body if isinstance(call, ast.Call) and _name(call.func) == "damage" else node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Drop messages."""
        known = isinstance(node.exc, ast.Call) and _name(node.exc.func) in _ERRORS
        return ast.Raise(ast.Name("ValueError", ast.Load())) if known else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Drop the message of `require`, and turn `list[T]()` into `list()`."""
        self.generic_visit(node)
        if _name(node.func) == "require":
            del node.args[1:]
        if isinstance(node.func, ast.Subscript) and _name(node.func.value) in {"list", "dict", "set"}:
            node.func = node.func.value
        return node


def _refuse_bases(node: ast.FunctionDef) -> None:
    """Let the function that reads an index know no base, so that it refuses the index of an update."""

    def speaks(statement: ast.stmt) -> bool:
        return isinstance(statement, ast.Assign | ast.Expr) and ast.unparse(statement).startswith(
            ("base = ", "require('base'")
        )

    node.body = [s for s in node.body if not speaks(s)]
    for inner in ast.walk(node):
        if isinstance(inner, ast.Set):
            inner.elts = [e for e in inner.elts if not (isinstance(e, ast.Constant) and e.value == "base")]
        elif isinstance(inner, ast.Call):
            inner.args = [ast.List([], ast.Load()) if _name(a) == "base" else a for a in inner.args]


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _bound(node: ast.stmt) -> set[str]:
    """Return the names that a top-level statement defines or changes."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {(a.asname or a.name).partition(".")[0] for a in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    return {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}


def _reachable(body: Iterable[ast.stmt], start: str) -> list[ast.stmt]:
    """Return the top-level statements that `start` needs, with imports split and not repeated."""
    split: dict[str, ast.stmt] = {}
    for node in body:
        for one in _single(node):
            split.setdefault(ast.dump(one), one)
    needed, wanted = set[str](), {start}
    while wanted != needed:
        needed = set(wanted)
        for node in split.values():
            if _bound(node) & needed:
                wanted |= _globals(symtable.symtable(ast.unparse(node), "", "exec"))
    return [n for n in split.values() if _bound(n) & needed]


def _globals(scope: symtable.SymbolTable) -> set[str]:
    """Return the global names that code refers to."""
    top = scope.get_type() == "module"
    found = {s.get_name() for s in scope.get_symbols() if s.is_referenced() and (top or s.is_global())}
    return found.union(*map(_globals, scope.get_children()))


def _single(node: ast.stmt) -> list[ast.stmt]:
    """Split an import of several names into several imports."""
    if isinstance(node, ast.Import):
        return [ast.Import([a]) for a in node.names]
    if isinstance(node, ast.ImportFrom):
        return [ast.ImportFrom(node.module, [a], node.level) for a in node.names]
    return [node]


def _positional(tree: ast.Module) -> ast.Module:
    """Make arguments positional where no call names them, so that they can be renamed."""
    named = {k.arg for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not named & {a.arg for a in node.args.args}:
            node.args.posonlyargs, node.args.args = [*node.args.posonlyargs, *node.args.args], []
    return tree
