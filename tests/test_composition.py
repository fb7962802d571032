"""The experiment of docs/sharing.md, small."""

import argparse
import importlib
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bytecap.model.checkpoint import load_checkpoint
from bytecap.recovery import kl_passes

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


class TestComposition:
    @pytest.fixture
    def composition(self, monkeypatch):
        monkeypatch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("composition")
        for name in ("common", "composition"):
            sys.modules.pop(name, None)

    @pytest.mark.nightly
    def test_from_training_to_paired_differences(self, composition, four, texts, tmp_path, capsys, monkeypatch):
        monkeypatch.setitem(kl_passes._TOKENS, "cpu", 512)  # of a move
        for name in ("literature", "technical", "general"):
            for kind in ("calib", "val"):
                shutil.copy(texts[kind], tmp_path / f"{name}.{kind}.txt")
        packed = tmp_path / "train.txt.xz"
        packed.write_bytes(lzma.compress(texts["calib"].read_bytes().replace(b"\f", b"\0")))
        args = argparse.Namespace(
            models=four.parent, model=[four.name], texts=tmp_path, train=[packed], blocks=2, lora_rank=2, steps="2",
            search_steps="9", rate=1e-3, full_rate=1e-4, labels=0.5, tokens=1000, eval_tokens=1500, device="cpu",
            seed=0, work=tmp_path / "work", output=tmp_path / "out.jsonl",
        )  # fmt: skip
        facts = [composition.train(args, 0, kind) for kind in ("b", "d", "g")]
        assert [f["moves"] for f in facts] == [2, 2, 2]
        assert facts[1]["sources"] == [0, 1, 0, 1]
        assert len(set(facts[2]["sources"])) == 2
        written = (args.work / "g-0" / "model.safetensors").stat().st_mtime_ns
        assert composition.train(args, 0, "g") == facts[2]
        assert (args.work / "g-0" / "model.safetensors").stat().st_mtime_ns == written
        students = {"a": four, "b-reinvested": args.work / "b-0", "c": args.work / "d-0", "d": args.work / "d-0"}
        students["g"] = args.work / "g-0"
        rows = [composition.one(args, "21kB", arm, 0, str(x)) | {"seed": 0} for arm, x in students.items()]
        by_arm = {r["arm"]: r for r in rows}
        assert all(20_900 < by_arm[x]["file_bytes"] <= 21_000 for x in ("a", "b-reinvested", "d", "g"))
        assert by_arm["c"]["file_bytes"] < 14_500
        assert by_arm["d"]["bits_by_uses"]["used 2 times"] > by_arm["c"]["bits_by_uses"]["used 2 times"]
        assert load_checkpoint(args.work / "b-0").config()["num_hidden_layers"] == 2
        composition.summarise(args, rows)
        lines = [json.loads(x) for x in args.output.read_text().splitlines()]
        found = next(x for x in lines if x.get("against") == "a")
        assert found["kl"]["mean"] == pytest.approx(by_arm["d"]["kl_nats"] - by_arm["a"]["kl_nats"], abs=1e-6)
        assert "low-rank" in by_arm["g"]["bits_by_uses"]
        assert "d - b-reinvested" in capsys.readouterr().out

    @pytest.mark.nightly
    def test_on_the_embedded_model(self, tmp_path):
        command = [
            sys.executable, str(FOLDER / "composition.py"), "--model", "demo", "--sizes", "450kB", "--blocks", "3",
            "--seeds", "0", "--steps", "6", "--arms", "a", "d", "e", "f", "--search-steps", "1",
            "--tokens", "4096", "--eval-tokens", "2048", "--device", "cpu",
            "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out.jsonl"),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own code)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()]
        rows = {x["arm"]: x for x in lines if x["benchmark"] == "composition"}
        assert len(rows) == 4
        assert all(x["file_bytes"] <= x["budget_bytes"] <= 450_000 for x in rows.values())
        assert all(rows[x]["training"]["kl"] < rows[x]["training"]["kl_start"] for x in ("d", "e", "f"))
        assert rows["d"]["bits_per_parameter"] > 1.3 * rows["a"]["bits_per_parameter"]
        assert sum(x["benchmark"] == "composition-summary" for x in lines) == 4 + 5
