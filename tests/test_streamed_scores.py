"""`bytecap eval --memory` reads a checkpoint or an artifact block by block, and scores it as the whole model does."""

import json
import shutil

import pytest

import bytecap
from bytecap.errors import CorruptError, UsageError
from bytecap.format import container
from bytecap.model import head, predicted
from bytecap.model.streamed_artifact import streamed_module
from bytecap.model.streamed_checkpoint import Unstreamable
from bytecap.pipeline.score import score
from conftest import BUDGET, KINDS, SMALL, VOCABULARY


@pytest.fixture
def scored(run, texts):
    """Function: (score, what was said) of a model, as the command line gives it."""

    def get(model, *more):
        code, out, err = run("eval", model, "--text", texts["val"], "--tokens", 900, "--window", 128, "--json", *more)
        assert code == 0, err
        found = json.loads(out)
        _, _, said = run("eval", model, "--text", texts["val"], "--tokens", 50, *more)
        return found, " ".join(said.split())

    return get


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_streamed_model_scores_as_the_whole_one(scored, fitted, model_directory, kind, pieces, monkeypatch):
    if pieces:
        monkeypatch.setitem(head._MOST, "cpu", 50 * VOCABULARY)
    monkeypatch.setitem(predicted.WAITING, "cpu", 300)  # tokens, so that blocks are read several times
    for model in (model_directory(kind), fitted(kind)[1]):
        whole, said = scored(model)
        assert "is streamed" not in said
        streamed, said = scored(model, "--memory", "1MB")
        assert "the model is streamed" in said, said
        assert streamed["tokens"] == whole["tokens"]
        assert streamed["bpb"] == pytest.approx(whole["bpb"], rel=1e-5)
        assert streamed["bpb_stderr"] == pytest.approx(whole["bpb_stderr"], rel=1e-3)


@pytest.mark.slow
def test_models_without_a_chain_and_updates_are_scored_whole(scored, model_directory, texts, tmp_path):
    directory, path = model_directory("rotary", num_hidden_layers=1), tmp_path / "one.bcap"
    files = {"calibration": texts["calib"], "evaluation": texts["val"]}
    bytecap.fit(directory, BUDGET, output=path, **files, **SMALL)
    for model in (directory, path):
        whole, _ = scored(model)
        found, said = scored(model, "--memory", "1MB")
        assert "is not streamed: it has no chain" in said
        assert found["bpb"] == whole["bpb"]
    update = tmp_path / "update.bcap"
    bytecap.fit(directory, BUDGET, output=update, base=path, **files, **SMALL)
    with pytest.raises(Unstreamable, match="together with its base"):
        streamed_module(container.open_file(update), "update")
    assert score(update, texts["val"], tokens=50, base=path, memory="1MB")


def test_words_that_do_not_fit_are_refused(refused, fitted):
    model = fitted()[1]
    assert "cannot read the size 'much'" in refused("eval", model, "--memory", "much")
    assert "--memory is for" in refused("eval", model, "--factory", "a.py:b", "--memory", "1MB")


def test_a_file_that_shrinks_meanwhile_is_named(fitted, texts, tmp_path, monkeypatch):
    path = tmp_path / "a.bcap"
    shutil.copy(fitted()[1], path)

    def cut(*_args, **_kwargs):
        path.write_bytes(path.read_bytes()[:900])

    monkeypatch.setattr("bytecap.pipeline.score.check_model", cut)
    with pytest.raises(CorruptError, match="has become shorter"):
        score(path, texts["val"], tokens=50, memory="1MB")


@pytest.mark.slow
def test_artifacts_without_a_config_cannot_be_scored(model_directory, texts, tmp_path):
    path = tmp_path / "bare.bcap"
    bytecap.fit(
        model_directory("rotary"), BUDGET, output=path, calibration=texts["calib"], evaluation=texts["val"],
        config=False, method="uniform", **SMALL,
    )  # fmt: skip
    with pytest.raises((UsageError, bytecap.errors.ArtifactError), match=r"holds no config\.json"):
        score(path, texts["val"], tokens=50, memory="1MB")


@pytest.mark.parametrize("memory", [None, "1MB"])
def test_a_file_is_opened_once(fitted, texts, monkeypatch, memory):
    opened, real = [], container.FileBytes
    monkeypatch.setattr(container, "FileBytes", lambda path: (opened.append(path), real(path))[1])
    score(fitted("rotary")[1], texts["val"], tokens=200, device="cpu", memory=memory)
    assert len(opened) == 1
