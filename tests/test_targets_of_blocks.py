"""Block formats coded along a walk: what is written, and what decides about it."""

import pytest

from bytecap.pipeline import fit_directory as directories
from bytecap.runtimes.gguf import targets
from conftest import SMALL


@pytest.mark.slow
@pytest.mark.parametrize("pays", [True, False])
def test_codes_of_the_walk_are_written_where_they_pay(pays, model_directory, texts, monkeypatch):
    seen, follow = {}, directories.follow_prefix

    def spy(job, items, coding, found):
        after = follow(job, items, coding, found)
        seen.update(items=items, before=found, after=after)
        return after

    monkeypatch.setattr(directories, "follow_prefix", spy)
    monkeypatch.setattr(targets, "surely_worse", lambda *_: not pays)
    report = directories.fit_directory(
        model_directory("rotary"), 26_000, format="mlx", calibration=texts["calib"], evaluation=texts["val"], **SMALL
    ).report
    before, after = seen["before"], seen["after"]
    assert (after is before) == (not pays)
    assert report["predicted_delta_nats"] == after.predicted
    if not pays:
        return
    assert (after.settings, after.plan) == (before.settings, before.plan)  # and so the bytes
    moved = {n for n in after.rounded if after.rounded[n] is not before.rounded[n]}
    assert moved == {i.place.name for i in seen["items"] if "proj" in i.place.unit}
    first = "model.layers.0.self_attn.q_proj.weight"  # what is in front of it is coded, too: the embedding
    assert (after.rounded[first].values != before.rounded[first].values).any()
