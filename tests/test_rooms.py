"""No import circle between modules. The order of the rooms is [tool.importlinter] in pyproject.toml."""

import ast
import graphlib
from pathlib import Path

import pytest

import bytecap
from bytecap.system.cache import measuring_sources

SOURCE = Path(bytecap.__file__).parents[1]


def modules(root):
    """Path of every module by its name."""
    names = {p.relative_to(root).with_suffix("").parts: p for p in root.glob("bytecap*/**/*.py")}
    return {".".join(n[:-1] if n[-1] == "__init__" else n): p for n, p in names.items()}


def imports(path, known):
    """Modules that a file imports anywhere: on top, inside a function, for typing only."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            inside = {f"{node.module}.{a.name}" for a in node.names}
            found |= {m if m in known else node.module for m in inside}
    return found & known.keys()


def order(root):
    known = modules(root)
    return list(graphlib.TopologicalSorter({n: imports(p, known) for n, p in known.items()}).static_order())


def test_no_module_imports_itself_through_others():
    assert len(order(SOURCE)) > 200


@pytest.mark.parametrize(
    "line",
    [
        "from bytecap import one",
        "import bytecap.one",
        "def f():\n    from bytecap.one import x",
        "if X:\n    from bytecap import one",
    ],
)
def test_circles_are_seen(tmp_path, line):
    package = tmp_path / "bytecap"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "one.py").write_text("from bytecap.two import y\n")
    (package / "two.py").write_text("y = 1\n")
    assert order(tmp_path)[-1] == "bytecap.one"
    (package / "two.py").write_text(line + "\n")
    with pytest.raises(graphlib.CycleError):
        order(tmp_path)


def test_a_mark_leaves_a_module_or_a_package_out_of_what_measures(tmp_path):
    for name, text in {
        "bytecap/__init__.py": "",
        "bytecap/measures.py": "",
        "bytecap/shows.py": 'SHOWS_ONLY = "module"\n',
        "bytecap/pages/__init__.py": 'SHOWS_ONLY = "package"\n',
        "bytecap/pages/inner/one.py": "",
        "bytecap_lab/__init__.py": 'SHOWS_ONLY = "module"\n',
        "bytecap_lab/two.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(measuring_sources(tmp_path)) == ["bytecap/__init__.py", "bytecap/measures.py", "bytecap_lab/two.py"]


@pytest.mark.parametrize("scope", ["True", '"pakage"', '"package"'])  # the last one in a plain module
def test_a_wrong_mark_is_an_error_that_names_the_file(tmp_path, scope):
    (tmp_path / "bytecap").mkdir()
    (tmp_path / "bytecap" / "shows.py").write_text(f"SHOWS_ONLY = {scope}\n")
    with pytest.raises(ValueError, match=r"shows\.py"):
        measuring_sources(tmp_path)


def test_pages_are_left_out_and_calibration_is_not():
    kept = measuring_sources(SOURCE)
    assert "bytecap/calibration/probe.py" in kept
    assert not any(n.startswith(("bytecap/report/", "bytecap/cli/")) for n in kept)


PYTHON = sorted(
    p
    for folder in ("src", "tests", "benchmarks", "examples")
    for p in Path(__file__).parents[1].glob(f"{folder}/**/*.py")
)


def too_long(path):
    """Files and functions beyond the bounds of CONTRIBUTING.md."""
    text = path.read_text("utf-8")
    if (count := text.count("\n")) > 400:
        yield f"{path} has {count} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            count = (node.end_lineno or 0) - node.lineno + 1
            if count > 60:
                yield f"{node.name} in {path} has {count} lines"


def test_no_file_and_no_function_is_too_long():
    assert len(PYTHON) > 400
    assert not [line for p in PYTHON for line in too_long(p)]


@pytest.mark.parametrize(("lines", "found"), [(59, 0), (60, 1), (401, 2)])
def test_what_is_too_long_is_seen(tmp_path, lines, found):
    (tmp_path / "a.py").write_text("def f():\n" + "    x = 1\n" * lines)
    assert len(list(too_long(tmp_path / "a.py"))) == found
