"""The thesis: rules that can decide both ways, lines that are measured once, a page made of them alone."""

import json

import pytest

from bytecap import thesis
from bytecap.report.thesis import page
from conftest import BUDGET, SMALL

OPTIONS = {**SMALL, "budget": str(BUDGET), "rungs": 2, "seeds": 2}


@pytest.fixture(scope="module")
def tested(tmp_path_factory, model_directory, texts):
    """(verdicts, directory, model) of a tiny run."""
    output = tmp_path_factory.mktemp("thesis")
    model = str(model_directory("rotary"))
    files = {"calibration": (texts["calib"], texts["val"]), "evaluation": texts["val"]}
    return thesis.thesis(model, output, **files, **OPTIONS), output, model


def test_small(tested):
    found, output, _ = tested
    print(
        json.dumps(
            [
                (e["name"], c["base"], c["verdict"], c["reason"], c["effects"])
                for e in found["experiments"]
                for c in e["cells"]
            ],
            indent=1,
        )
    )
    assert page(found)
