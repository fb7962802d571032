"""A Python that has imported transformers already, and forks for every script that a test would start a Python for.

Importing transformers takes longer than all that `bytecap.model.apart` asks of it. Scripts still run in processes of
their own, with their limits, their exit codes and their deaths; only what starts them is another.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys, traceback

sys.path[:] = json.loads(sys.argv[1])
sys.modules["torch"] = None  # as in `bytecap.model.apart`
import numpy, tokenizers, transformers

transformers.PreTrainedTokenizerFast


def work(asked):
    for number, (name, flags) in enumerate(zip(asked["files"], (os.O_RDONLY, os.O_WRONLY, os.O_WRONLY))):
        os.dup2(os.open(name, flags), number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")
    sys.argv = ["-c", *asked["arguments"]]
    try:
        exec(compile(asked["script"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for line in sys.stdin:
    child = os.fork()
    if not child:
        code = work(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Warm:
    """Stands in for the module `subprocess`, where all that is run is `python -I -c SCRIPT ...`."""

    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self):
        self.server = None

    def run(self, command, *, input, env, timeout, **_):  # noqa: A002 (as subprocess calls it)
        """Like `subprocess.run`; the time limit is left to the script's own."""
        del timeout
        assert command[1:3] == ["-I", "-c"]
        if self.server is None:
            places = json.dumps([p for p in sys.path if Path(p).is_absolute()])
            self.server = subprocess.Popen(  # noqa: S603 (our own text)
                [sys.executable, "-I", "-c", SERVER, places], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env=env,
            )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("in", "out", "err")]
            for file, content in zip(files, (input, b"", b""), strict=True):
                file.write_bytes(content)
            asked = {"files": list(map(os.fspath, files)), "script": command[3], "arguments": command[4:]}
            self.server.stdin.write(json.dumps(asked) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(command, code, files[1].read_bytes(), files[2].read_bytes())

    def close(self):
        """End the server."""
        if self.server is not None:
            self.server.communicate()
