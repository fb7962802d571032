"""Values that every worker of a test run needs are made by one of them and read by the others.

Session fixtures of pytest-xdist live once in every worker, so that each of them would fit the same tiny models again.
`Once` keeps a pickle of each value in the temporary directory that the workers of a run share, under a lock: the first
to ask makes the value, the others wait and read it. Nothing outlives the run.
"""

import contextlib
import fcntl
import hashlib
import pickle

MADE = "value.pickle"


class Once:
    """Values by key, in a directory that processes share."""

    def __init__(self, directory):
        self.directory, self.known = directory, {}
        directory.mkdir(exist_ok=True)

    def __call__(self, key, make):
        """Return what `make(directory)` returned the first time anybody asked for `key`; files it left there stay.

        The key is text or a tuple whose `repr` says all that the value depends on.
        """
        if key not in self.known:
            name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
            place = self.directory / name
            with self._locked(name):
                if not (place / MADE).exists():
                    place.mkdir(exist_ok=True)
                    (place / MADE).write_bytes(pickle.dumps(make(place)))
                self.known[key] = pickle.loads((place / MADE).read_bytes())  # noqa: S301 (this run wrote it)
        return self.known[key]

    @contextlib.contextmanager
    def _locked(self, name):
        with (self.directory / f"{name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
