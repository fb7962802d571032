"""Code sections in threads of their own while other units are still being rounded.

Coding takes no GPU, and a walk for targets little else: what is finished is coded meanwhile. Each section is that of
`Planner.encode`, so its bytes do not depend on when it is coded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType
from typing import Self

import torch

from bytecap.allocation.planner import Planner, State
from bytecap.job import Section
from bytecap.quantization.quantizer import Coded


class Packing:
    """Sections that are being coded; leaving its `with` block drops what has not begun.

    Args:
        planner: the units.
        state: tables and offsets, steps of vectors, and integers of the matrices that are there already.
        later: matrices that are added later.
    """

    def __init__(self, planner: Planner, state: State, later: Collection[str]) -> None:
        self._planner, self._state = planner, state.holding(())
        self._begun: dict[str, Future[Section]] = {}
        self._pool = ThreadPoolExecutor(max(1, torch.get_num_threads() - 1))
        for name in planner.names:
            if name not in later:
                self._begin(name, {name: state.coded[name]} if name in state.coded else {})

    def add(self, coded: Mapping[str, Coded]) -> None:
        """Begin to code rounded units; those of a walk that begins anew take the place of the ones before."""
        for name in coded:
            self._begin(name, {name: coded[name]})

    def sections(self) -> dict[str, Section]:
        """Return the sections of all units, which are waited for."""
        return {n: self._begun[n].result() for n in self._planner.names}

    def _begin(self, name: str, coded: Mapping[str, Coded]) -> None:
        self._begun[name] = self._pool.submit(self._coded, name, replace(self._state, coded=coded))

    def _coded(self, name: str, state: State) -> Section:
        return self._planner.keep_section(Section(*self._planner.encode(state, [name])[name]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(cancel_futures=True)
