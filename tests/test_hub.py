"""`fit --layout hub`, cards, and what becomes of hostile names."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

import bytecap
from bytecap.errors import BudgetError, UsageError
from bytecap.format import container
from bytecap.format.ledger import Entry, total
from bytecap.pipeline.score import open_model, score
from bytecap.report.card import Source, card, licence_of, quoted
from bytecap.runtimes import hub
from conftest import SMALL

BUDGET = 32_000
HOSTILE = "x](javascript:alert(1)) <img src=x onerror=alert(1)> | `a`\n---\nlicense: mit\n# b \x1b[2J\u202e @all"


@pytest.fixture(scope="module")
def source(model_directory, tmp_path_factory):
    """A tiny model with a card and a licence."""
    import shutil

    directory = tmp_path_factory.mktemp("source") / "tiny"
    shutil.copytree(model_directory(), directory)
    (directory / "README.md").write_text("---\nlicense: other\nlicense_name: 'free-1'\n---\n# Tiny\n")
    (directory / "LICENSE").write_text("Do as you like.\n")
    return directory


@pytest.fixture(scope="module")
def made(source, texts, tmp_path_factory):
    """(artifact, directory) of a fit in the hub's layout."""
    directory = tmp_path_factory.mktemp("made") / "hub"
    found = bytecap.fit(
        source, BUDGET, calibration=texts["calib"], evaluation=texts["val"], layout="hub", output=directory,
        effort=0, **SMALL,
    )  # fmt: skip
    return found, directory


@pytest.fixture
def said(run):
    """Function: standard output of a command line that succeeds."""

    def call(*arguments):
        code, out, err = run(*arguments)
        assert code == 0, err
        return out

    return call


def code_on(text):
    """The Python lines of a card."""
    return text.partition("```python\n")[2].partition("```")[0]


@pytest.mark.slow
class TestFit:
    def test_all_files_together_meet_the_cap(self, made):
        artifact, directory = made
        sizes = {p.name: p.stat().st_size for p in directory.iterdir()}
        assert sum(sizes.values()) == artifact.report["file_bytes"] <= BUDGET
        assert artifact.report["slack_bytes"] == BUDGET - sum(sizes.values()) < 1500
        assert sizes["model.bcap"] == artifact.report["weights_bytes"] > 1000
        assert {"config.json", "tokenizer.json", "README.md", "LICENSE", hub.SHARDS} <= sizes.keys()
        assert not any(n.endswith((".safetensors", ".bin")) for n in sizes)
        assert total(artifact.ledger()) == total(hub.ledger_of(directory)) == artifact.report["file_bytes"]

    def test_side_files_are_stored_once(self, made, source):
        _, directory = made
        contents = container.read(directory / "model.bcap")
        assert contents.files == ()
        assert (directory / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()

    def test_the_card(self, made):
        artifact, directory = made
        text = (directory / "README.md").read_text("utf-8")
        assert text.startswith('---\nlicense: "other"\nlicense_name: "free-1"\n')
        report = artifact.report
        assert f"{report['kl_nats']:.4f} ± {report['kl_stderr']:.4f}" in text
        assert f"{report['bpb_original']:.4f} → {report['bpb_artifact']:.4f} ± {report['bpb_stderr']:.4f}" in text
        assert "import bytecap.runtimes.transformers" in text
        assert "its text is in `LICENSE`" in text
        assert f"{report['statistics_tokens']:,} tokens" in text
        assert f"cap of {BUDGET:,} bytes" in text
        table = text.partition("| kind | bytes |")[2].partition("\n\n")[0]
        counted = sum(int(line.split("|")[2].replace(",", "")) for line in table.splitlines()[2:])
        assert counted == report["file_bytes"] - len(text.encode()), "every byte but the card's own"

    def test_the_lines_on_the_card_load_the_model(self, made):
        artifact, directory = made
        found = {}
        code = code_on((directory / "README.md").read_text("utf-8"))
        exec(code.replace('"DIR"', repr(str(directory))), found)  # noqa: S102 (our own card)
        wanted, theirs = artifact.load_model().state_dict(), found["model"].float().state_dict()
        assert all(torch.equal(wanted[n].bfloat16().float(), theirs[n]) for n in wanted)
        assert found["tokenizer"]("The")["input_ids"]

    def test_options_of_loading_are_taken(self, made):
        module = made[0].load_model(dtype="bfloat16", resident="coded")
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        with pytest.raises(UsageError, match="neither decoded nor coded"):
            made[0].load_model(resident="packed")

    def test_it_is_a_model_everywhere(self, made, texts):
        artifact, directory = made
        import transformers

        import bytecap.runtimes.transformers  # noqa: F401 (registers itself)

        wanted = artifact.load_model().state_dict()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).state_dict()
        opened = open_model(directory).module.state_dict()
        assert all(torch.equal(wanted[n], theirs[n]) and torch.equal(wanted[n], opened[n]) for n in wanted)
        (found,) = score(directory, texts["val"], window=SMALL["window"], tokens=SMALL["evaluation_tokens"])
        assert found.bpb == pytest.approx(artifact.report["bpb_artifact"], abs=1e-6)

    def test_several_budgets_and_the_command_line(self, source, texts, tmp_path, said):
        done = said(
            "fit", source, "--layout", "hub", "--budget", "30kB,34kB", "-o", tmp_path / "h-{budget}", "--calib",
            texts["calib"], "--eval", texts["val"], "--method", "uniform", "--tokens", "500", "--eval-tokens", "500",
            "--window", "64", "--json",
        )  # fmt: skip
        for report, (name, cap) in zip(json.loads(done)["fits"], (("30kB", 30_000), ("34kB", 34_000)), strict=True):
            size = sum(p.stat().st_size for p in (tmp_path / f"h-{name}").iterdir())
            assert size == report["file_bytes"] <= cap == report["budget_bytes"]
        shown = said("ledger", tmp_path / "h-30kB", "--json")
        assert json.loads(shown)["file_bytes"] == sum(p.stat().st_size for p in (tmp_path / "h-30kB").iterdir())
        text = said("card", tmp_path / "h-30kB", "--source", source)
        assert 'license_name: "free-1"' in text


class TestRefusals:
    def test_a_budget_below_the_other_files(self, source, texts, tmp_path):
        with pytest.raises(BudgetError, match="config, tokenizer, card and licence take") as heard:
            bytecap.fit(source, 5000, calibration=texts["calib"], layout="hub", output=tmp_path / "x")
        assert heard.value.floor > 5000
        with pytest.raises(BudgetError, match=r"and for model\.bcap a budget"):
            bytecap.fit(source, heard.value.floor + 100, calibration=texts["calib"], layout="hub")
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize(
        ("options", "said"),
        [({"layout": "hubb"}, "unknown layout"), ({"layout": "hub", "tokenizer": False}, "--no-tokenizer is not for"),
         ({"layout": "hub", "base": "x.bcap"}, "base is for single files"),
         ({"layout": "hub", "format": "mlx"}, "layout is not for the format mlx")],
    )  # fmt: skip
    def test_options(self, options, said):
        with pytest.raises(UsageError, match=said):
            bytecap.fit("no such model", BUDGET, **options)

    def test_modules(self):
        module = torch.nn.Sequential(torch.nn.Embedding(64, 8), torch.nn.Linear(8, 64))
        with pytest.raises(UsageError, match="layout hub is for checkpoints"):
            bytecap.fit(module, 3000, calibration=[torch.zeros(2, 3, dtype=torch.int64)], layout="hub")


class TestCards:
    def test_of_a_file_alone(self, said, tmp_path):
        golden = Path(__file__).parent / "goldens" / "files.bcap"
        said("card", golden, "-o", tmp_path / "README.md")
        text = (tmp_path / "README.md").read_text("utf-8")
        assert f"The model in {golden.stat().st_size:,} bytes" in text
        assert "## Quality" not in text
        assert "bytecap.load_model" in text

    def test_of_an_update(self, said):
        updates = Path(__file__).parent / "goldens" / "updates"
        text = said("card", updates / "all.bcap")
        sha256 = hashlib.sha256((updates / "base.bcap").read_bytes()).hexdigest()
        size = (updates / "all.bcap").stat().st_size
        assert f"An update in {size:,} bytes of the file with SHA-256 `{sha256}`." in text
        assert 'load_model("model.bcap", base="BASE.bcap")' in code_on(text)

    def test_figures_of_a_report(self, said, tmp_path):
        figures = {"kl_nats": 0.25, "kl_stderr": 0.01, "bpb_original": 1.5, "bpb_artifact": 1.6, "bpb_stderr": 0.02,
                   "same_top1": 0.9, "statistics_tokens": 1000, "seed": 3, "method": "bytecap"}  # fmt: skip
        (tmp_path / "fit.json").write_text(json.dumps(figures))
        golden = Path(__file__).parent / "goldens" / "files.bcap"
        text = said("card", golden, "--report", tmp_path / "fit.json")
        assert "| all | 0.2500 ± 0.0100 | 1.5000 → 1.6000 ± 0.0200 | 90.0% |" in text
        assert "calibrated on 1,000 tokens, seed 3" in text

    def test_hostile_names_stay_text(self):
        entries = [Entry(HOSTILE, "payload", 1000, 100), Entry("(file)", "header", 10)]
        report = {"texts": [{"name": HOSTILE, "kl_nats": 1.0, "kl_stderr": 0.1}] * 2, "kl_nats": 1.0, "kl_stderr": 0.1,
                  "statistics_tokens": 10, "calibration_texts": [{"name": HOSTILE}], "method": HOSTILE,
                  "seed": HOSTILE, "same_top1": True, "budget_bytes": HOSTILE}  # fmt: skip
        source = Source(HOSTILE, {"license": HOSTILE, "license_name": HOSTILE}, HOSTILE)
        text = card(entries, report, source, whole=True)
        front, _, body = text.removeprefix("---\n").partition("\n---\n")
        assert sum(line.startswith("license:") for line in front.splitlines()) == 1
        for line in front.splitlines()[:2]:
            assert json.loads(line.partition(": ")[2]) == HOSTILE
        for bad in ("<img", "](", "\x1b", "\u202e", "@all", "`a`", "\n# b", "license: mit"):
            assert bad not in body, bad
        rows = [line for line in body.splitlines() if line.startswith("|")]
        assert {line.count("|") for line in rows} <= {4, 5}

    @pytest.mark.parametrize(
        ("text", "found"),
        [("", {}), ("# no front matter\nlicense: mit", {}), ("---\nlicense: mit\n", {}),
         ("---\r\nlicense: apache-2.0\r\nbase: x\r\n---\r\n", {"license": "apache-2.0"}),
         ("---\nlicense: other\nlicense_name: n\nlicense_link: https://e.org/l\n---\n",
          {"license": "other", "license_name": "n", "license_link": "https://e.org/l"}),
         ("---\n license: nested\ntags:\n  license: mit\n---\n", {})],
    )  # fmt: skip
    def test_licences(self, text, found):
        assert licence_of(text) == found

    @pytest.mark.parametrize("name", ["a`b", "a``b", "`", "", "a b", "-x", "www.evil.org"])
    def test_names(self, name):
        assert quoted(name).count("`") in {0, 2}
        assert quoted(name)[1:-1].count("`") == 0
