"""Hold the tables and offsets under which units are rounded, priced and decoded at one point of a search.

A search settles a model again and again, and each time refits tables and reconstruction offsets to the integers that
came out. The rules of one settling are the start of the next, so they are a value that is handed on, and that JSON can
hold for a run that is started again.

>>> from bytecap.quantization.options import Options
>>> rules = initial_rules(Options())
>>> back = rules_from_json(rules_to_json(rules))
>>> (back.shrink.offset == rules.shrink.offset).all().item(), len(back.shared.tables.table)
(True, 63)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from bytecap.format.coders import Shared
from bytecap.format.coders.classes import CLASSES, UNIT_CLASS, quarter
from bytecap.format.entropy.frequencies import MAX_HALF, Table, Tables
from bytecap.format.entropy.shared_tables import fit_shared
from bytecap.quantization import Shrink, gaussian_shrink
from bytecap.quantization.options import Options

_DENSE = UNIT_CLASS - 3  # the first class whose columns are not sparse


@dataclass(frozen=True)
class Rules:
    """Tables and offsets of one settling.

    Attributes:
        shared: tables that price the integers, and offsets that they are decoded with.
        shrink: offsets that rounding aims at; after a settling those it has just found.
    """

    shared: Shared
    shrink: Shrink

    def with_offsets(self, offset: npt.NDArray[np.float32]) -> Rules:
        """Return the rules with the same tables and other offsets (64, CENTRES), for rounding and decoding."""
        return Rules(replace(self.shared, offset=offset), Shrink(offset))


def initial_rules(options: Options, *, descent: bool = False) -> Rules:
    """Return Gaussian tables and offsets for every class, from which fitting starts.

    Args:
        options: of the coder.
        descent: columns of little spread are rounded by descent (`bytecap.quantization.descent`), whose points lie at
            the steps or above where those of feedback lie below.
    """
    shrink = gaussian_shrink()
    if descent:
        shrink.offset[:_DENSE] = 0
    if not options.shrink:
        shrink = Shrink(np.zeros_like(shrink.offset))
    z = np.arange(MAX_HALF + 2)
    counts = np.zeros((CLASSES, MAX_HALF + 2))
    for k in range(1, CLASSES):
        sigma = max(float(quarter(k - UNIT_CLASS)), 0.2)
        counts[k] = np.exp(-0.5 * (z / sigma) ** 2) * np.where(z, 2, 1)
        counts[k] *= 1e6 / counts[k].sum()
    counts[counts < 1e-2] = 0
    fitted = fit_shared(counts, np.zeros((2, 64, 17)), None)
    return Rules(Shared(fitted.tables, shrink.offset), shrink)


def rules_to_json(rules: Rules) -> dict[str, Any]:
    """Return rules as JSON can hold them; classes that share a table keep sharing it."""
    shared, shrink = rules.shared, rules.shrink
    distinct = shared.tables.distinct()
    place = {id(t): i for i, (_, t) in enumerate(distinct)}
    return {
        "tables": [[t.low, t.freq.tolist()] for _, t in distinct],
        "classes": [[c, place[id(t)]] for c, t in shared.tables.table.items()],
        "offset": shared.offset.tolist(), "shrink": shrink.offset.tolist(),
    }  # fmt: skip


def rules_from_json(value: Mapping[str, Any]) -> Rules:
    """Read the rules that `rules_to_json` wrote."""
    tables = [Table(low, np.array(freq)) for low, freq in value["tables"]]
    offset, shrink = (np.array(value[k], np.float32) for k in ("offset", "shrink"))
    return Rules(Shared(Tables({c: tables[i] for c, i in value["classes"]}), offset), Shrink(shrink))
