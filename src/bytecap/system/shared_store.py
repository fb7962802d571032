"""Let ranks share a store that only rank 0 reads and writes.

Hosts need not see the same directory: what rank 0 finds goes to all, and what all have made rank 0 keeps. So all ranks
go the same way, whether an entry is there or not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt

from bytecap.system.cache import Store
from bytecap.system.ranks import Ranks


class SharedStore(Store):
    """A store whose files belong to rank 0.

    Args:
        directory: of the store; None where nothing is kept.
        ranks: the processes that share it.

    Raises:
        OutputError: rank 0 cannot make the directory, or write to it.
    """

    def __init__(self, directory: Path | str | None, ranks: Ranks) -> None:
        self._ranks = ranks
        super().__init__(directory if ranks.first else None)
        self.directory = Path(directory) if directory is not None else None

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold a key on rank 0, for which the others wait."""
        with super().lock(key) if self._ranks.first else contextlib.nullcontext():
            self._ranks.all(None)
            yield

    def get(self, key: str) -> Any:
        """Return the JSON value that rank 0 finds."""
        return None if self.directory is None else self._ranks.from_first(lambda: Store.get(self, key))

    def put(self, key: str, value: Any) -> None:
        """Keep a JSON value on rank 0."""
        if self._ranks.first:
            super().put(key, value)

    def arrays(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return the arrays that rank 0 finds."""
        if self.directory is None:
            return None
        found: dict[str, npt.NDArray[Any]] = {}
        own = self.own_arrays(key) if self._ranks.first else None
        names = self._ranks.from_first(lambda: None if own is None else list(own))
        for name in names or ():  # one at a time: together they may be larger than a host's memory
            found[name] = self._ranks.from_first(partial((own or {}).get, name))
        return None if names is None else found

    def put_arrays(self, key: str, values: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep arrays on rank 0."""
        if self._ranks.first:
            super().put_arrays(key, values)

    def once(
        self, key: Callable[[], str], make: Callable[[], Mapping[str, npt.NDArray[Any]]]
    ) -> Mapping[str, npt.NDArray[Any]]:
        """Return the arrays of a key; all ranks make them where they are missing."""
        if self.directory is None:
            return make()
        name: str = self._ranks.from_first(key)
        return super().once(lambda: name, make)
