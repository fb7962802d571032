"""Folders for a browser: every byte counted, hashes, the runtime's package, and what is refused."""

import gzip
import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from bytecap.errors import BudgetError, OutputError, UsageError
from bytecap.job.config import FitConfig
from bytecap.pipeline import export_web as job
from bytecap.runtimes.web import runtime as packages
from bytecap.runtimes.web.folder import LEDGER, MODEL, SCRIPT, WASM, Site
from bytecap.runtimes.web.runtime import NAME, integrity_of, parse_package, read_runtime
from conftest import SMALL
from pages import Strict
from web import SCRIPT as STAND_IN
from web import package

BUDGET = 45_000
HOSTILE = '</script><img src=x onerror="alert(1)">\u2028&amp;{{MADE}}{{TITLE}}'


@pytest.fixture(scope="module")
def tgz(tmp_path_factory):
    path = tmp_path_factory.mktemp("package") / "wllama.tgz"
    path.write_bytes(package())
    return path


@pytest.fixture
def no_fit(monkeypatch):
    """A fit that writes so many bytes as it may and costs nothing."""

    def fit(_, configs):
        Path(configs[0].output).write_bytes(b"GGUF" * (configs[0].budget // 4))
        return [type("Found", (), {"report": {"bpb_artifact": 1.0, "kl_nats": 0.1}})]

    monkeypatch.setattr(job, "fit_gguf_configs", fit)


def parsed(page):
    found = Strict()
    found.feed(page)
    found.close()
    assert found.open == []
    return found


def manifest(page):
    return json.loads(page.partition('id="made">')[2].partition("</script>")[0])


class TestPackage:
    def test_its_parts_come_out_as_they_are(self):
        found = parse_package(package(), "it")
        assert gzip.decompress(found.script) == STAND_IN
        assert gzip.decompress(found.wasm) == b"wasm of the stand-in"
        assert (found.version, found.licence) == ("2.9.9", b"MIT License")
        assert found.integrity == integrity_of(package()) != integrity_of(b"")

    @pytest.mark.parametrize(
        ("data", "said"),
        [
            (b"no tar", "no npm package"),
            (package()[:200], "no npm package|lacks|no readable"),
            (package(name="other"), "is other 2.9.9"),
            (package(version="3.13.0"), "is @wllama/wllama 3.13.0"),
            (package(**{"package.json": b"{"}), "no readable package.json"),
            (package(**{"esm__single-thread__wllama.wasm": None}), "lacks package/esm/single-thread/wllama.wasm"),
            (package(LICENCE=None), "lacks package/LICENCE"),
        ],
    )
    def test_others_are_refused(self, data, said):
        with pytest.raises(UsageError, match=said):
            parse_package(data, "it")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(UsageError, match="cannot read the runtime"):
            read_runtime(tmp_path / "none.tgz")

    def test_without_npm_it_says_how(self, monkeypatch):
        monkeypatch.setattr(packages.shutil, "which", lambda _: None)
        with pytest.raises(UsageError, match=r"npm pack @wllama/wllama@2.*--runtime"):
            read_runtime(None)

    def test_npm_fails(self, monkeypatch):
        monkeypatch.setattr(packages.shutil, "which", lambda _: "npm")

        def run(command, **_):
            raise subprocess.CalledProcessError(1, command, stderr=b"npm error one\nnpm error no network")

        monkeypatch.setattr(packages.subprocess, "run", run)
        with pytest.raises(UsageError, match=r"no network.*--runtime"):
            read_runtime(None)

    def test_another_package_than_the_known_one(self, monkeypatch):
        monkeypatch.setattr(packages, "_fetched", package)
        with pytest.raises(UsageError, match="its hash is sha512-"):
            read_runtime(None)
        monkeypatch.setattr(packages, "INTEGRITY", integrity_of(package()))
        assert read_runtime(None).version == "2.9.9"


class TestSite:
    @pytest.mark.parametrize("size", [1, 9_999, 10_000, 1_234_567, 9_000_000])
    def test_what_is_fixed_is_an_upper_bound_and_the_ledger_is_exact(self, size):
        site = Site("tiny", 128, 9_876_543, parse_package(package(), "it"))
        files = site.files(size, "ab" * 32)
        assert site.fixed - 60 <= sum(map(len, files.values())) <= site.fixed
        found = json.loads(files[LEDGER])
        assert {f["name"]: f["bytes"] for f in found["files"]} == {n: len(d) for n, d in files.items()} | {MODEL: size}
        assert found["total_bytes"] == sum(f["bytes"] for f in found["files"])

    def test_a_hostile_title_stays_text(self):
        page = Site(HOSTILE, 128, 10**6, parse_package(package(), "it")).files(5, "0" * 64)["index.html"].decode()
        assert manifest(page)["title"] == HOSTILE
        found = parsed(page)
        assert "<img" not in page
        assert found.links == ["data:,", "app.js"]  # nothing from elsewhere

    def test_the_page_asks_nobody_but_its_server(self):
        files = Site("tiny", 128, 10**6, parse_package(package(), "it")).files(5, "0" * 64)
        for name in ("index.html", "app.js", "sw.js"):
            assert "http:" not in files[name].decode()
            assert "https:" not in files[name].decode()
        policy = files["index.html"].decode().partition('Policy" content="')[2].partition('"')[0]
        assert "default-src 'none'" in policy
        assert "unsafe-eval" not in policy.replace("wasm-unsafe-eval", "")


@pytest.mark.slow
def test_a_folder_meets_the_cap_and_says_where_every_byte_went(run, model_directory, texts, tgz, tmp_path):
    pytest.importorskip("gguf")
    site = tmp_path / "site"
    arguments = [
        "export", "web", model_directory("rotary"), "--budget", BUDGET, "-o", site, "--runtime", tgz, "--calib",
        texts["calib"], "--eval", texts["val"], "--tokens", SMALL["tokens"], "--eval-tokens",
        SMALL["evaluation_tokens"], "--window", SMALL["window"], "--json",
    ]  # fmt: skip
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    report, ledger = json.loads(out), json.loads((site / LEDGER).read_bytes())
    sizes = {p.name: p.stat().st_size for p in site.iterdir()}
    assert sum(sizes.values()) == report["total_bytes"] == ledger["total_bytes"] <= BUDGET == ledger["budget_bytes"]
    assert report["files"] == sizes == {f["name"]: f["bytes"] for f in ledger["files"]}
    assert sum(report["owners"].values()) == report["total_bytes"]
    assert report["fit"]["file_bytes"] == sizes[MODEL] <= report["model_budget_bytes"]
    made = manifest((site / "index.html").read_text("utf-8"))
    assert {f["name"] for f in made["files"]} == {MODEL, SCRIPT, WASM}
    for f in [*made["files"], *(f for f in ledger["files"] if f["name"] != LEDGER)]:
        data = (site / f["name"]).read_bytes()
        assert (f["bytes"], f["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert (site / MODEL).read_bytes()[:4] == b"GGUF"
    assert list(tmp_path.iterdir()) == [site]


class TestWriting:
    def export(self, tgz, path, **changes):
        return job.export_web("demo", FitConfig(**{"budget": 100_000, "output": path, **changes}), runtime=tgz)

    @pytest.mark.usefixtures("no_fit")
    def test_a_folder_of_ours_is_replaced_and_others_are_not(self, tgz, tmp_path):
        first = self.export(tgz, tmp_path / "site")
        second = self.export(tgz, tmp_path / "site", budget=90_000)
        assert second.report["total_bytes"] < first.report["total_bytes"] <= 100_000
        assert sum(e.bytes for e in second.ledger()) == second.report["total_bytes"]
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "index.html").write_text("mine", "utf-8")
        with pytest.raises(OutputError, match="holds other files"):
            self.export(tgz, tmp_path / "mine")

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
    def test_interrupted_it_leaves_nothing(self, monkeypatch, tgz, tmp_path, stop):
        def fit(_, configs):
            Path(configs[0].output).write_bytes(b"half of a mod")
            raise stop

        monkeypatch.setattr(job, "fit_gguf_configs", fit)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            self.export(tgz, tmp_path / "site")
        assert list(tmp_path.iterdir()) == []

    def test_a_cap_below_the_runtime(self, tgz, tmp_path):
        with pytest.raises(BudgetError, match="nothing is left for a model") as caught:
            self.export(tgz, tmp_path / "site", budget=2000)
        assert caught.value.floor > 2000
        assert list(tmp_path.iterdir()) == []

    def test_a_cap_below_the_smallest_model_names_both(self, tgz, tmp_path):
        pytest.importorskip("gguf")
        with pytest.raises(BudgetError, match=r"page and runtime hold .* below the floor") as caught:
            self.export(tgz, tmp_path / "site", budget=300_000)
        assert caught.value.floor > 300_000
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"budget": "1MB,2MB"}, "one budget"),
            ({"budget": "1.5"}, "no unit"),
            ({"format": "mlx"}, "not the format mlx"),
            ({"method": "uniform"}, "method is not for"),
        ],
    )
    def test_options_of_other_jobs(self, tgz, tmp_path, changes, said):
        with pytest.raises(UsageError, match=said):
            self.export(tgz, tmp_path / "site", **changes)

    def test_the_command_needs_a_place(self, refused, tgz, tmp_path):
        assert "-o DIR" in refused("export", "web", "demo", "--budget", "3MB", "--runtime", tgz)
        at = tmp_path / "file"
        at.write_text(NAME, "utf-8")
        assert "there is a file" in refused("export", "web", "demo", "--budget", "3MB", "--runtime", tgz, "-o", at)
