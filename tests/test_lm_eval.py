"""lm-evaluation-harness, the program itself, on local tasks: a file scores as its unpacked directory does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bytecap.format import container
from bytecap.model.checkpoint import load_checkpoint
from bytecap.pipeline.export import unpack
from stored import contents_of

pytest.importorskip("lm_eval", reason="lm-eval is an extra: pip install 'bytecap[lm-eval]'")
pytestmark = [pytest.mark.nightly]

# The King James Bible (Ecclesiastes 3 and 1) and Herrick (1648): public domain.
CLOZE = [
    ("To every thing there is a season, and a time to every", " purpose"),
    ("a time to plant, and a time to pluck up that which is", " planted"),
    ("a time to keep silence, and a time to", " speak"),
    ("One generation passeth away, and another generation", " cometh"),
    ("Gather ye rosebuds while ye may, old time is still a", "-flying"),
    ("And this same flower that smiles to-day, to-morrow will be", " dying"),
]
CHOICES = [
    ("All the rivers run into the", ["sea", "sun", "season"], 0),
    ("The sun also ariseth, and the sun goeth", ["up", "down", "silent"], 1),
    ("A time to weep, and a time to", ["laugh", "weep", "river"], 0),
    ("There is no new thing under the", ["table", "house", "sun"], 2),
]


def tasks(directory):
    """Two task files and their data."""
    directory.mkdir()
    (directory / "cloze.jsonl").write_text("".join(json.dumps({"text": t, "end": e}) + "\n" for t, e in CLOZE))
    (directory / "choice.jsonl").write_text(
        "".join(json.dumps({"text": t, "choices": c, "gold": g}) + "\n" for t, c, g in CHOICES)
    )
    head = "task: {0}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {1}\ntest_split: test\n"
    (directory / "cloze.yaml").write_text(
        head.format("local_cloze", directory / "cloze.jsonl")
        + 'output_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{end}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
        "  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    (directory / "choice.yaml").write_text(
        head.format("local_choice", directory / "choice.jsonl")
        + 'output_type: multiple_choice\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{gold}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return directory


def harness(module, model, arguments, tmp_path, name):
    """Scores that the harness's own command line writes."""
    out = tmp_path / name
    command = [
        sys.executable, "-m", module, "run", "--model", model, "--model_args", arguments, "--tasks",
        "local_cloze,local_choice", "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "2",
        "--output_path", str(out), "--log_samples",
    ]  # fmt: skip
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)  # noqa: S603
    if done.returncode:
        return done
    (written,) = out.rglob("results_*.json")
    found = json.loads(written.read_text())["results"]
    samples = {p.name.partition("_2")[0]: [json.loads(x)["resps"] for x in p.read_text().splitlines()]
               for p in out.rglob("samples_*.jsonl")}  # fmt: skip
    return found, samples


@pytest.fixture(scope="module")
def made(model_directory, tmp_path_factory):
    directory = tmp_path_factory.mktemp("harness")
    tasks(directory / "tasks")
    container.write(contents_of(load_checkpoint(model_directory())), directory / "model.bcap")
    unpack(directory / "model.bcap", directory / "plain")
    return directory


def test_a_file_scores_as_its_directory(made):
    ours = harness(
        "bytecap.runtimes.lm_eval", "bytecap", f"pretrained={made / 'model.bcap'},prefix_token_id=0", made, "ours"
    )
    theirs = harness("lm_eval", "hf", f"pretrained={made / 'plain'},prefix_token_id=0", made, "theirs")
    assert not isinstance(ours, subprocess.CompletedProcess), ours.stderr
    assert not isinstance(theirs, subprocess.CompletedProcess), theirs.stderr
    assert ours[1] == theirs[1]  # the likelihood of every answer
    assert len(ours[1]) == 2
    for task in ("local_cloze", "local_choice"):
        assert ours[0][task] == theirs[0][task]
    assert ours[0]["local_cloze"]["perplexity,none"] > 1


def test_weights_that_stay_coded_score_alike(made):
    arguments = f"pretrained={made / 'model.bcap'},prefix_token_id=0"
    decoded, coded = (
        harness("bytecap.runtimes.lm_eval", "bytecap", arguments + more, made, name)
        for more, name in (("", "decoded"), (",resident=coded", "coded"))
    )
    assert not isinstance(coded, subprocess.CompletedProcess), coded.stderr
    assert coded[1] == decoded[1]
    done = harness("bytecap.runtimes.lm_eval", "bytecap", f"pretrained={made / 'plain'},resident=coded", made, "plain2")
    assert done.returncode == 2
    assert "loads directories that hold model.bcap" in done.stderr.splitlines()[-1]


def test_resident_reaches_the_loader(made, monkeypatch):
    import bytecap.runtimes.lm_eval as ours
    from bytecap.model import resident

    monkeypatch.setattr(resident, "_SMALL", 100)
    kept = []
    monkeypatch.setattr(resident, "_hook", lambda *given, hook=resident._hook: (kept.append(given), hook(*given)))
    for how in ("decoded", "coded"):
        ours.BytecapLM(str(made / "model.bcap"), resident=how, device="cpu", prefix_token_id=0)
        assert bool(kept) == (how == "coded")


def test_damage_is_said_in_a_line(made):
    data = (made / "model.bcap").read_bytes()
    (made / "cut.bcap").write_bytes(data[: len(data) // 2])
    done = harness("bytecap.runtimes.lm_eval", "bytecap", f"pretrained={made / 'cut.bcap'}", made, "cut")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "cut.bcap" in done.stderr.splitlines()[-1]


def test_the_module_registers_the_name():
    from lm_eval.api.registry import get_model

    import bytecap.runtimes.lm_eval as ours

    assert get_model("bytecap") is ours.BytecapLM
    assert Path(ours.__file__).name == "lm_eval.py"


def test_scores_stand_beside_kl(made, model_directory, texts, run):
    paths = [x for name in ("cloze", "choice") for x in ("--tasks", made / "tasks" / f"{name}.yaml")]
    code, out, err = run(
        "compare", model_directory(), "--budgets", "21000", "--methods", "uniform", "--calib", texts["calib"], "--eval",
        texts["val"], "--tokens", "500", "--eval-tokens", "500", "-o", made / "out", *paths, "--json",
    )  # fmt: skip
    assert code == 0, err
    (cell,) = json.loads(out)["models"][0]["cells"]
    assert cell["scores"]["mean"]["kl"]["mean"] > 0
    assert {"local_cloze perplexity", "local_cloze acc", "local_choice acc"} == cell["tasks"].keys()
    found = cell["tasks"]["local_cloze perplexity"]
    assert found["questions"] == len(CLOZE)
    assert found["mean"] < 0 < found["stderr"]
    assert found["difference"]["mean"] == pytest.approx(found["mean"] - found["original"])
    assert cell["tasks"]["local_choice acc"]["questions"] == len(CHOICES)
    code, out, err = run("compare", "--from", made / "out" / "runs.jsonl", "-o", made / "again")
    assert code == 0, err
    assert "minus original" in out
    assert "local_choice acc" in out
    (made / "no.yaml").write_text("output_type: loglikelihood\n")
    code, _, err = run("compare", model_directory(), "-o", made / "o2", "--tasks", made / "no.yaml")
    assert code == 2
    assert "defines no task" in err
