"""The ledger's sums: by owner, by kind, by overlay."""

import json

import pytest

from bytecap.format import container
from bytecap.format.ledger import KINDS, Entry, Line, by_kind, by_overlay, by_unit, total
from golden_parts import build

pytestmark = pytest.mark.coverage

ENTRIES = [
    Entry("b", "payload", 10, 7), Entry("a", "side", 2, 5), Entry("a", "payload", 8, 5), Entry("a", "side", 1, 5),
    Entry("(file)", "header", 28), Entry("a", "rows side", 3, 5), Entry("b", "rows payload", 6, 7),
    Entry("b", "rows side", 4, 7), Entry("b", "columns payload", 9, 7), Entry("(file)", "padding", 0),
]  # fmt: skip


def test_an_index_that_another_writer_has_packed():
    """JSON with spaces is an index too: every byte of the file has an owner all the same."""
    raw = json.dumps({"units": [], "files": [], "about": {"made": "elsewhere " * 20}}, indent=4).encode()
    data = build([(container.INDEX, b"\0" + raw)])
    entries = container.ledger(container.parse(data), len(data))
    assert total(entries) == len(data) > total(container.ledger(container.parse(data)))
    assert [(e.unit, e.kind) for e in entries] == [("(file)", "header"), ("(file)", "index")]


def test_total():
    assert total(ENTRIES) == 71
    assert total([]) == 0


def test_lines_are_sorted_by_size_then_name():
    lines = by_unit([*ENTRIES, Entry("(last)", "config", 28), Entry("none", "table", 0)])
    assert [(line.unit, line.bytes, line.parameters) for line in lines] == [
        ("b", 29, 7), ("(file)", 28, 0), ("(last)", 28, 0), ("a", 14, 5), ("none", 0, 0),
    ]  # fmt: skip
    assert lines[3] == Line("a", 5, {"side": 3, "payload": 8, "rows side": 3})


def test_paths_count_units_once():
    assert by_overlay(ENTRIES) == {"columns": {"units": 1, "bytes": 9}, "rows": {"units": 2, "bytes": 13}}
    assert list(by_overlay(ENTRIES)) == ["columns", "rows"]


def test_kinds_are_in_the_ledgers_order_without_zeros():
    found = by_kind(ENTRIES)
    assert found == {"header": 28, "side": 10, "payload": 33}
    assert list(found) == [k for k in KINDS if k in found]


def test_entries_as_dictionaries():
    assert Entry("a", "side", 2).as_dict() == {"unit": "a", "kind": "side", "bytes": 2, "parameters": 0}
