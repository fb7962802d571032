"""Kill `fit` or `curves` at random moments, again and again, and look at what is left.

Every attempt is a process of its own, forked from one that has imported everything, so that moments fall on work and
not on imports. It is killed with SIGKILL at a random moment and started again on the same store; after every few kills
one attempt may finish. Run `python tests/crashes.py fit --kills 50`; the last line is what was counted, as JSON.
`--undisturbed DIR` keeps the undisturbed outcome for the next call, where 50 kills are made in several pieces.
"""

import argparse
import gc
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import forks

OLD = b"the old file"
FAULTS = ("partial", "old_lost", "different", "leftovers")  # counts that must be 0
NAMES = {"fit": ("out.bcap",), "curves": ("curves.json", "curves.html")}


def start(arguments):
    """Process id of a command line, forked."""
    from bytecap.cli import app

    def work():
        sys.argv = ["bytecap", *map(str, arguments)]
        code = None
        try:
            app.main()
        except SystemExit as exc:
            code = exc.code
        gc.collect()  # a fork ends without what Python does at its end: work files go with what holds them
        raise SystemExit(code)

    return forks.start(work, Path(os.devnull))


def finish(pid, limit=None):
    """Exit code of a process; None if it was killed after `limit` seconds."""
    end = time.monotonic() + (limit if limit is not None else 1e9)
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


class Crashes:
    """One command, its undisturbed outcome, and what was counted."""

    def __init__(self, command, options, directory, seed, kept=None):
        self.command, self.options, self.directory = command, options, directory
        self.work, self.store = directory / "work", directory / "store"
        self.kept = kept or directory / "undisturbed"
        self.random = random.Random(seed)  # noqa: S311
        self.seen = dict.fromkeys(("kills", "finished", *FAULTS), 0)
        self.seen["resumed_seconds"] = []

    def arguments(self, work, store):
        output = work / "out.bcap" if self.command == "fit" else work
        return [self.command, *self.options, "-o", output, "--store", store, "--json"]

    def undisturbed(self):
        """Run once, on a store of its own, unless an earlier call has kept what that gave."""
        about = self.kept / "seconds"
        if not about.exists():
            self.kept.mkdir(parents=True)
            began = time.monotonic()
            assert finish(start(self.arguments(self.kept, self.directory / "other"))) == 0
            about.write_text(f"{time.monotonic() - began:.2f}", "ascii")
        self.seconds = float(about.read_text("ascii"))
        self.expected = {n: (self.kept / n).read_bytes() for n in NAMES[self.command]}

    def fresh(self):
        """An old file under every final name, and no store."""
        for directory in (self.work, self.store):
            shutil.rmtree(directory, ignore_errors=True)
        self.work.mkdir()
        for name in self.expected:
            (self.work / name).write_bytes(OLD)
        self.since = 0

    def check(self, *, done):
        """Count what should not be."""
        for name, wanted in self.expected.items():
            path = self.work / name
            found = path.read_bytes() if path.exists() else None
            self.seen["old_lost"] += found is None
            self.seen["partial"] += found not in {None, OLD, wanted}
            self.seen["different"] += done and found != wanted
        if done:
            files = [p.name for d in (self.work, self.store) for p in d.iterdir()]
            self.seen["leftovers"] += sum(n.endswith(".tmp") or n.startswith("bytecap-work-") for n in files)

    def attempt(self, *, kill):
        began = time.monotonic()
        code = finish(
            start(self.arguments(self.work, self.store)), self.random.uniform(0, self.seconds) if kill else None
        )
        assert code in {0, None}, code
        if code is None:
            self.seen["kills"] += 1
            self.since += 1
            self.check(done=False)
            return
        self.seen["finished"] += 1
        if self.since:
            self.seen["resumed_seconds"].append(round(time.monotonic() - began, 2))
        self.check(done=True)
        self.fresh()

    def run(self, kills, seconds):
        began = time.monotonic()
        self.undisturbed()
        self.fresh()
        while self.seen["kills"] < kills and time.monotonic() < began + seconds:
            self.attempt(kill=self.since < 3 or self.random.random() < 0.5)
        self.attempt(kill=False)
        return {"command": self.command, "seconds": round(self.seconds, 2), **self.seen}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=NAMES)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=1e9, help="start no attempt after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--undisturbed", type=Path, help="directory of the undisturbed outcome, made by the first call")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--budget", default="600kB")
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=["--tokens", "512", "--eval-tokens", "256"])
    asked = parser.parse_args()
    import torch
    import transformers  # noqa: F401 (so that forks need not)

    import bytecap.methods.bytecap
    import bytecap.pipeline.fit  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        options = [asked.model, "--budget", asked.budget, *asked.more]
        found = Crashes(asked.command, options, Path(directory), asked.seed, asked.undisturbed)
        counted = found.run(asked.kills, asked.seconds)
    about = {"model": Path(asked.model).name, "budget": asked.budget, "seed": asked.seed, "host": platform.machine()}
    sys.stdout.write(
        json.dumps(counted | about | {"run": " ".join(["python", "tests/crashes.py", *sys.argv[1:]])}) + "\n"
    )
    return sum(counted[k] for k in FAULTS)


if __name__ == "__main__":
    sys.exit(main())
