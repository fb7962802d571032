"""The same inputs, seed and versions give the same bytes, whatever the threads; a file the same values anywhere."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy._core._multiarray_umath import __cpu_dispatch__

import bytecap
from bytecap.model.checkpoint import demo_directory
from bytecap.model.forward import fast_dtype
from conftest import BUDGET, SMALL
from forks import child

HERE = Path(__file__).parent
FINGERPRINTS = HERE / "fingerprints.json"
DEMO = {"tokens": 512, "evaluation_tokens": 256}


def sha(data):
    return hashlib.sha256(data).hexdigest()


def demo(budget="600kB"):
    texts = demo_directory()
    return bytecap.fit("demo", budget, calibration=texts / "calib.txt", evaluation=texts / "val.txt", **DEMO).data


def in_fresh_process(code, **environment):
    """The output of a new Python."""
    made = subprocess.run(  # noqa: S603 (our own code)
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    return made.stdout


class TestSameBytes:
    @pytest.mark.slow
    @pytest.mark.parametrize("threads", [2, pytest.param(4, marks=pytest.mark.nightly)])
    def test_whatever_the_number_of_threads(self, fitted, model_directory, texts, tmp_path, threads):
        def work():
            torch.set_num_threads(threads)
            bytecap.fit(
                model_directory("rotary"), BUDGET, calibration=texts["calib"], evaluation=texts["val"],
                output=tmp_path / "a.bcap", **SMALL,
            )  # fmt: skip

        assert child(work) == 0
        assert (tmp_path / "a.bcap").read_bytes() == fitted()[0].data

    @pytest.mark.nightly
    @pytest.mark.parametrize("threads", ["1", "2", "4"])
    def test_of_the_embedded_model_in_fresh_processes(self, tmp_path, threads):
        code = (
            f"import sys, torch; sys.path.insert(0, {str(HERE)!r}); torch.set_num_threads({threads}); "
            f"import test_determinism as t; open({str(tmp_path / threads)!r}, 'wb').write(t.demo())"
        )
        in_fresh_process(code, OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
        assert (tmp_path / threads).read_bytes() == demo()


DECODE = """
import hashlib, sys
from pathlib import Path
from bytecap.format.decoder import load
for path in sorted(Path(sys.argv[1] if len(sys.argv) > 1 else "GOLDENS").glob("*.bcap")):
    if not path.name.startswith("bad_"):
        total = hashlib.sha256()
        for name, values in load(path).items():
            total.update(repr((name, values.dtype.str, values.shape)).encode() + values.tobytes())
        print(path.name, total.hexdigest())
"""
VECTORS = " ".join(__cpu_dispatch__)  # what this numpy would use beyond its baseline
SETTINGS = {
    "no vector units": {"NPY_DISABLE_CPU_FEATURES": VECTORS},
    "another BLAS kernel, four threads": {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "4"},
    "no compiled code": {"NUMBA_DISABLE_JIT": "1"},
}  # fmt: skip


class TestSameValues:
    @pytest.mark.slow
    @pytest.mark.parametrize("setting", SETTINGS)
    def test_of_every_golden(self, setting):
        code = DECODE.replace("GOLDENS", str(HERE / "goldens"))
        plain = in_fresh_process(code, OPENBLAS_NUM_THREADS="1")
        assert plain.count("\n") >= 12
        assert in_fresh_process(code, **SETTINGS[setting], PYTHONWARNINGS="ignore") == plain


def processor():
    """The processor's model: kernels of libraries are chosen by it, not by its vector units alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    found = dict(line.partition(":")[::2] for line in lines if ":" in line)
    values = {k.strip(): v.strip() for k, v in found.items()}
    return " ".join(values.get(k, "?") for k in ("vendor_id", "cpu family", "model", "stepping"))


def platform_key():
    """All that the encoder's arithmetic depends on besides our own code."""
    capability = torch.backends.cpu.get_cpu_capability()
    fast = str(fast_dtype(torch.device("cpu"))).removeprefix("torch.")
    return f"{platform.machine()} {processor()} {capability} {fast} torch {torch.__version__} numpy {np.__version__}"


CHANGED = (
    "The demo artifact has other bytes than before. If that is meant, say so in CHANGELOG.md and write the new "
    f"fingerprints to {FINGERPRINTS.name}: python tests/test_determinism.py"
)


class TestReplay:
    """Committed fingerprints: a change of bytes cannot slip through."""

    @pytest.mark.slow
    def test_lossless(self):
        """Integers from end to end: the same on every machine."""
        assert sha(demo("2500kB")) == json.loads(FINGERPRINTS.read_text("utf-8"))["lossless"], CHANGED

    @pytest.mark.nightly
    def test_lossy(self):
        """Floating point decides: the same where the arithmetic is the same."""
        known = json.loads(FINGERPRINTS.read_text("utf-8"))
        if platform_key() not in known:
            pytest.skip(f"no fingerprint for {platform_key()}")
        assert sha(demo()) == known[platform_key()], CHANGED


def main():
    """Write fingerprints of this machine."""
    known = json.loads(FINGERPRINTS.read_text("utf-8")) if FINGERPRINTS.exists() else {}
    known |= {"lossless": sha(demo("2500kB")), platform_key(): sha(demo())}
    FINGERPRINTS.write_text(json.dumps(known, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
