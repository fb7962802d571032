"""Conformance: what every registered coder must do, checked on the goldens; a new coder joins by its golden alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bytecap.format import container
from bytecap.format.coders import overlay_coders, registry
from bytecap.format.coders.stack import CODER as STACK
from bytecap.format.decoder import decode_units
from bytecap.format.ledger import KINDS, total

pytestmark = pytest.mark.coverage

DIRECTORY = Path(__file__).parent / "goldens"
GOLDENS = [DIRECTORY / name for name in json.loads((DIRECTORY / "expected.json").read_text())["valid"]]
UPDATES = [DIRECTORY / "updates" / f"{name}.bcap" for name in ("same", "long", "all")]
BASE, DIFFERENCE = 16, 41


def test_every_coder_has_a_golden() -> None:
    used = {u.tag for path in (*GOLDENS, *UPDATES) for u in container.read(path).units}
    assert used == set(registry())


def test_every_layer_has_goldens_over_two_bases() -> None:
    bases: dict[int, set[int]] = {tag: set() for tag in overlay_coders()}
    for u in (u for path in (*GOLDENS, *UPDATES) for u in container.read(path).units if u.tag == STACK.tag):
        (base, _, _), *stacked = STACK.parts(u.data)
        for tag, _, _ in stacked:
            bases[tag].add(base)
    assert BASE in bases.pop(DIFFERENCE)
    assert all(len(over - {BASE}) >= 2 for over in bases.values())


def test_ids_and_tags_are_unique() -> None:
    coders = registry() | overlay_coders()
    assert len({c.id for c in coders.values()}) == len(coders)
    assert all(tag == c.tag for tag, c in coders.items())


@pytest.mark.parametrize("path", GOLDENS, ids=lambda p: p.stem)
def test_sections_are_fully_owned_and_decode_to_their_shape(path: Path) -> None:
    contents = container.read(path)
    for u in contents.units:
        kinds = registry()[u.tag].kinds(u.data, u.unit.matrix_shape, u.unit.dtype)
        assert sum(n for _, n in kinds) == len(u.data)
        assert {k.rpartition(" ")[2] for k, _ in kinds} <= set(KINDS)
    assert total(container.ledger(contents)) == path.stat().st_size
    values = decode_units(contents, aliases=False)
    assert {n: v.shape for n, v in values.items()} == {u.unit.name: u.unit.shape for u in contents.units}
