"""Mutation testing: one small change of the source at a time, and whether a fast sub-suite notices.

    python tests/mutants.py                          # every module; goes on where build/mutants.jsonl ends
    python tests/mutants.py entropy --seconds 300    # some modules, starting no mutant after so long
    python tests/mutants.py --survivors              # what is known to survive, without running anything

Mutants are made from the syntax tree: comparisons shifted, swapped or negated, `and` for `or`, arithmetic operators
exchanged, integers one more and one less, booleans turned round, conditions negated, statements left out, None
returned. Left alone: annotations, decorators, docstrings, the texts of errors, strings.

Tests are collected once; every mutant is a fork into which the changed functions and constants are put, and which runs
the module's sub-suite up to the first failure, under a limit of processor time. One at a time, so one core at most.
A mutant no test can kill, because it is the same program, is listed as `equivalent` in docs/mutants.md, with its
reason; so is every other survivor, as `survives`. The exit code is 1 where
yet another one survives, or fewer than 85% are killed.
"""

import argparse
import ast
import gc
import hashlib
import json
import os
import re
import resource
import signal
import sys
import time
import types
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
LIST = ROOT / "docs" / "mutants.md"
LEAST = 0.85  # share of mutants that are not equivalent to be killed
GOLDENS = "tests/test_reference.py::test_both_decoders_read_a_valid_golden_as_expected"
MODULES = {
    "allocate": "bytecap.allocation.allocate", "ledger": "bytecap.format.ledger",
    "entropy": "bytecap.format.entropy.rans", "artifact": "bytecap.format.container",
}  # fmt: skip
SUITES = {  # the tests that kill most come first
    "allocate": tuple(f"tests/test_allocate.py::Test{n}" for n in ("ByHand", "BetweenMeasuredPoints", "Shape")),
    "ledger": ("tests/test_ledger.py", "src/bytecap/format/ledger.py"),
    "entropy": ("src/bytecap/format/entropy/rans.py", "tests/test_streams.py", GOLDENS),
    "artifact": ("tests/test_container.py", GOLDENS),
}

# ---------------------------------------------------------------------------------------------------------- mutants

_COMPARISONS = {
    ast.Lt: (ast.LtE,), ast.LtE: (ast.Lt,), ast.Gt: (ast.GtE,), ast.GtE: (ast.Gt,), ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,), ast.In: (ast.NotIn,), ast.NotIn: (ast.In,), ast.Is: (ast.IsNot,), ast.IsNot: (ast.Is,),
}  # fmt: skip
_NEGATED_ANYWAY = (ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)  # whose swap is the negation
_ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.Add, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip
_SKIPPED = {"annotation", "returns", "decorator_list", "type_comment"}


def negated(test):
    return ast.UnaryOp(ast.Not(), test)


def changes(node):
    """Nodes that could stand instead of an expression."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            for other in _COMPARISONS[type(op)]:
                yield ast.Compare(node.left, [*node.ops[:i], other(), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        yield ast.BinOp(node.left, _ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        yield ast.Constant(node.value + 1)
        yield ast.Constant(node.value - 1)
    elif isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield ast.Constant(node.value + 1)


def statement_changes(node):
    """Nodes that could stand instead of a statement."""
    if isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        yield ast.AugAssign(node.target, _ARITHMETIC[type(node.op)](), node.value)
    stored = isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
    called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if stored or called or isinstance(node, ast.AugAssign | ast.Raise | ast.Break | ast.Continue):
        yield ast.Pass()
    if isinstance(node, ast.Return) and node.value is not None:
        yield ast.Return(ast.Constant(None))


def condition_changes(field, node):
    """The negation of a condition, unless another change is just that."""
    one = isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], _NEGATED_ANYWAY)
    if field in {"test", "ifs"} and not one and not (isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)):
        yield negated(node)


def places(parent):
    """(field, put, node) of every node below a node that is looked at; `put(other)` takes its place."""
    for field, value in ast.iter_fields(parent):
        if field in _SKIPPED:
            continue
        if isinstance(value, ast.AST):
            yield field, lambda other, f=field: setattr(parent, f, other), value
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, ast.AST):
                    yield field, lambda other, v=value, i=i: v.__setitem__(i, other), item


def passed_over(node):
    """Formatted text, docstrings and other bare strings, and what only type checkers read."""
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))


def sites(parent, scope=()):
    """(names of what it stands in, context, put, node, other) of every mutant of a tree."""
    for field, put, node in places(parent):
        if passed_over(node):
            continue
        inside = (*scope, node.name) if isinstance(node, ast.FunctionDef | ast.ClassDef) else scope
        context = parent if isinstance(node, ast.expr) and isinstance(parent, ast.expr) else node
        for other in (*changes(node), *statement_changes(node), *condition_changes(field, node)):
            yield inside, context, put, node, other
        if not isinstance(node, ast.Raise):  # what an error says is not tested word by word
            yield from sites(node, inside)


def text(node):
    return " ".join(ast.unparse(ast.fix_missing_locations(node)).split())


def mutants(source, *, compiled=True):
    """(key, code) of every mutant; keys hold no line numbers, so that they outlive changes elsewhere.

    Compiling takes longer than all else: without it, code is None.
    """
    tree, seen = ast.parse(source), Counter()
    for scope, context, put, node, other in sites(tree):
        before = text(context)
        put(other)
        after = text(other if context is node else context)
        code = compile(ast.fix_missing_locations(tree), "mutant", "exec", dont_inherit=True) if compiled else None
        put(node)
        key = f"{'.'.join(scope) or 'module'}: {before} -> {after}"
        seen[key] += 1
        yield key + (f" #{seen[key]}" if seen[key] > 1 else ""), code


# ------------------------------------------------------------------------------------------------------------- runs


def path_of(module):
    return (ROOT / "src" / MODULES[module].replace(".", "/")).with_suffix(".py")


def function_of(value):
    """The function in what a class or module holds: itself, or that of a property or a decorator; None in others."""
    for name in ("fget", "func", "__func__", "__wrapped__"):
        value = getattr(value, name, value)
    return value if isinstance(value, types.FunctionType) else None


def transplant(old, new, name):
    """Make everything that lives in `old` behave as in `new`; what others have imported is changed with it."""
    for key, value in list(vars(new).items()):
        was = vars(old).get(key)
        mine, other = function_of(was), function_of(value)
        if mine and other and mine.__module__ == name:
            mine.__code__, mine.__defaults__, mine.__kwdefaults__ = (
                other.__code__,
                other.__defaults__,
                other.__kwdefaults__,
            )
        elif isinstance(was, type) and was.__module__ == name and key.startswith("_"):
            setattr(old, key, value)  # nobody else has it
            transplant(was, value, name)
        elif isinstance(was, type) and was.__module__ == name:
            transplant(was, value, name)
        elif isinstance(was, int | float | tuple | list | dict) and was != value and not key.startswith("__"):
            for module in list(sys.modules.values()):
                if getattr(module, "__dict__", {}).get(key) is was:
                    setattr(module, key, value)


def change(module, code):
    """Put a mutant into this process."""
    name = MODULES[module]
    fresh = types.ModuleType(name)
    fresh.__file__ = str(path_of(module))
    exec(code, vars(fresh))  # noqa: S102 (our own source, changed)
    transplant(sys.modules[name], fresh, name)


def passes(session):
    """Whether all tests pass, asked up to the first that does not."""
    for item, following in zip(session.items, [*session.items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return False
    return True


def attempt(session, module, code, limit):
    """The fate of a mutant in a fork."""
    pid = os.fork()
    if not pid:
        outcome = 1
        try:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 1)
            os.dup2(nothing, 2)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
            resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, resource.getrlimit(resource.RLIMIT_DATA)[1]))
            change(module, code)
            outcome = int(not passes(session))
        finally:
            os._exit(outcome)
    until = time.monotonic() + 40 * limit  # one that sleeps uses no processor time
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return "timeout" if os.WIFSIGNALED(done[1]) else "killed" if os.waitstatus_to_exitcode(done[1]) else "survived"


class Mutants:
    """A pytest plugin that runs the collected tests once, then for every mutant whose outcome is not known."""

    def __init__(self, module, known, state, until):
        self.module, self.known, self.state, self.until = module, known, state, until

    def pytest_sessionstart(self):
        prepare()

    def pytest_runtestloop(self, session):
        source = path_of(self.module).read_text("utf-8")
        left = [m for m in mutants(source) if m[0] not in self.known]
        assert session.items
        start = resource.getrusage(resource.RUSAGE_CHILDREN)
        same = attempt(session, self.module, compile(source, "same", "exec", dont_inherit=True), 600)
        assert same == "survived", f"the sub-suite of {self.module} fails without any mutant"
        spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start.ru_utime
        print(f"\n{self.module}: {len(left)} mutants left, the sub-suite takes {spent:.1f} s", flush=True)  # noqa: T201
        about = {"module": self.module, "fingerprint": fingerprint(self.module)}
        gc.freeze()
        with self.state.open("a", encoding="utf-8") as f:
            for key, code in left:
                if time.monotonic() > self.until:
                    break
                found = attempt(session, self.module, code, 3 + int(1.5 * spent))
                f.write(json.dumps(about | {"key": key, "outcome": found}) + "\n")
                f.flush()
        return True


def explore(module, known, state, until):
    """Run a module's mutants in a process of its own; returns whether its sub-suite passes."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            flags = "-q --tb=short --noconftest --doctest-modules -p no:cacheprovider -p no:xdist -s -o addopts="
            code = int(pytest.main([*flags.split(), *SUITES[module]], plugins=[Mutants(module, known, state, until)]))
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def prepare():
    """Few examples and no shrinking, and the loops of numpy where a test does not ask for others."""
    import numpy as np
    from hypothesis import Phase, settings

    from bytecap.format.entropy import jit, rans

    settings.register_profile(
        "mutants", deadline=None, max_examples=20, derandomize=True, phases=[Phase.explicit, Phase.generate],
        database=None,
    )  # fmt: skip
    settings.load_profile("mutants")
    tables, one = rans.Tables.from_counts({1: {0: 1}}), np.ones(1, np.uint8)
    for jit.worth in (lambda _: True, lambda _: False):  # the first ones compile
        rans.decode([rans.Stream(rans.encode(one, one, tables), one, tables)])


def fingerprint(module):
    """Hash of a module and of all tests: outcomes of other ones say nothing."""
    total = hashlib.sha256(path_of(module).read_bytes())
    for name in sorted({part.partition("::")[0] for part in SUITES[module]}):
        total.update((ROOT / name).read_bytes())
    return total.hexdigest()[:16]


def outcomes(state, module, *, keep=False):
    """Known outcomes of a module's mutants, by key; `keep` counts those killed before the tests changed."""
    lines = state.read_text("utf-8").splitlines() if state.exists() else []
    known = [json.loads(line) for line in lines if line.endswith("}")]
    mine = fingerprint(module)
    mine_too = {"killed", "timeout"} if keep else set()
    known = [k for k in known if k["module"] == module and (k["fingerprint"] == mine or k["outcome"] in mine_too)]
    return {k["key"]: k["outcome"] for k in known}


# --------------------------------------------------------------------------------------------------------- the list


def listed():
    """Verdict of every (module, key) in docs/mutants.md."""
    found = {}
    for line in LIST.read_text("utf-8").splitlines() if LIST.exists() else []:
        row = re.fullmatch(r"\| (\w+) \| `` (.*) `` \| (equivalent|survives) \| .+ \|", line)
        if row:
            found[row[1], row[2].replace(r"\|", "|")] = row[3]
    return found


def summary(module, known):
    """Counts of one module, and its survivors."""
    verdicts = listed()
    keys = [key for key, _ in mutants(path_of(module).read_text("utf-8"), compiled=False)]
    alive = [k for k in keys if known.get(k) == "survived"]
    equivalent = [k for k in alive if verdicts.get((module, k)) == "equivalent"]
    counted = Counter(known.get(k, "not run") for k in keys)
    killed = counted["killed"] + counted["timeout"]
    row = {
        "module": module, "mutants": len(keys), "not_run": counted["not run"], "killed": killed,
        "of_these_by_time": counted["timeout"], "survived": len(alive), "of_these_equivalent": len(equivalent),
        "share": round(killed / max(1, killed + len(alive) - len(equivalent)), 4),
    }  # fmt: skip
    return row, [(k, verdicts.get((module, k), "NEW")) for k in alive]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", choices=[[], *SUITES], help="all by default")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no mutant after so long")
    parser.add_argument("--state", type=Path, default=ROOT / "build" / "mutants.jsonl")
    parser.add_argument("--record", type=Path, help="append the counts to this file")
    parser.add_argument("--keep", action="store_true", help="what was killed stays so, though tests have changed since")
    parser.add_argument("--survivors", action="store_true", help="run nothing")
    asked = parser.parse_args()
    modules, good, until = asked.modules or list(SUITES), True, time.monotonic() + asked.seconds
    os.chdir(ROOT)
    asked.state.parent.mkdir(parents=True, exist_ok=True)
    if not asked.survivors:
        sys.path[:0] = [str(TESTS), str(ROOT / "src")]
        for module in modules:
            good &= explore(module, outcomes(asked.state, module, keep=asked.keep), asked.state, until)
    for module in modules:
        row, alive = summary(module, outcomes(asked.state, module, keep=asked.keep))
        for key, verdict in alive:
            print(f"{verdict:10} {module}: {key}")  # noqa: T201
        print(json.dumps(row))  # noqa: T201
        good &= row["share"] >= LEAST and not row["not_run"] and all(v != "NEW" for _, v in alive)
        if asked.record:
            with asked.record.open("a", encoding="utf-8") as f:
                f.write(json.dumps(row | {"run": " ".join(["python", "tests/mutants.py", *sys.argv[1:]])}) + "\n")
    return int(not good)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
