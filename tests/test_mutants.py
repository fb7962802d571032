"""The runner of mutants: what it changes, and that its list of survivors is up to date."""

import sys
import types

import pytest

import mutants

SOURCE = '''
"""Text."""
LIMIT: int = 3
def f(a, b: int = 2, *, c=True):
    """Text."""
    if a < b and not c:
        raise ValueError(f"{a} + {1}")
    a += 1
    return -a
'''


def test_changes_of_a_small_module():
    assert [key for key, _ in mutants.mutants(SOURCE)] == [
        "module: 3 -> 4", "module: 3 -> 2", "f: True -> False", "f: 2 -> 3", "f: 2 -> 1",
        "f: a < b and (not c) -> a < b or not c", "f: a < b and (not c) -> not (a < b and (not c))",
        "f: a < b and (not c) -> a <= b and (not c)", "f: a < b and (not c) -> a < b and c",
        "f: raise ValueError(f'{a} + {1}') -> pass", "f: a += 1 -> a -= 1", "f: a += 1 -> pass",
        "f: 1 -> 2", "f: 1 -> 0", "f: return -a -> return None", "f: -a -> a",
    ]  # fmt: skip


def test_a_mutant_is_put_in_place(monkeypatch):
    old, new = types.ModuleType("old"), types.ModuleType("old")
    for module, code in ((old, SOURCE), (new, SOURCE.replace("+= 1", "-= 1").replace("3", "4"))):
        exec(code, vars(module))  # noqa: S102 (our own text)
    imported = old.f
    monkeypatch.setitem(sys.modules, "old", old)
    mutants.transplant(old, new, "old")
    assert imported(5) == -4
    assert old.LIMIT == 4


@pytest.mark.slow
def test_listed_survivors_are_mutants():
    known = {
        name: {key for key, _ in mutants.mutants(mutants.path_of(name).read_text("utf-8"), compiled=False)}
        for name in mutants.SUITES
    }
    listed = mutants.listed()
    assert listed
    assert [item for item in listed if item[1] not in known[item[0]]] == []
