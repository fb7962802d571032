"""Budgets of directories: floors, the schemes that go lower, and what a dry run says."""

from __future__ import annotations

import re

import pytest

from bytecap.errors import BudgetError
from bytecap.pipeline.fit_directory import fit_directory
from bytecap.report.terminal import print_fit
from conftest import SMALL

pytestmark = pytest.mark.slow


def floor_of(error: BudgetError) -> tuple[int, list[str], int]:
    """Floor, the schemes that are said to go lower, and to how many bytes."""
    ((types, lower),) = re.findall(r"--types (\S+) would go down to ([\d,]+)", str(error))
    return error.floor, types.split(","), int(lower.replace(",", ""))


def test_a_floor_is_named_and_what_goes_lower(model_directory, texts) -> None:
    def fit(budget, **more):
        return fit_directory(
            model_directory("rotary"), budget, format="compressed-tensors", calibration=texts["calib"],
            evaluation=texts["val"], dry_run=True, **SMALL, **more,
        )  # fmt: skip

    with pytest.raises(BudgetError, match=r"below the floor of .* kept in bf16 are .*embed_tokens") as caught:
        fit(20_000)
    assert "gguf" not in str(caught.value)  # its rows are too short for the types of fewest bits
    floor, types, lower = floor_of(caught.value)
    assert 20_000 < lower < floor
    assert fit(lower, types=types).report["file_bytes"] == lower
    with pytest.raises(BudgetError, match=r"a \.bcap file goes lower") as caught:
        fit(lower - 1, types=types)
    assert "--types" not in str(caught.value)


def test_wide_rows_go_lower_as_gguf(model_directory) -> None:
    with pytest.raises(BudgetError, match="--format gguf goes lower"):
        fit_directory(model_directory("rotary", hidden_size=256, intermediate_size=256), 20_000, format="mlx")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"format": "mlx"}, ["dry run nothing written;", "is the smallest reachable directory"]),
        ({"format": "gguf", "emitted": "types.txt"}, ["nothing but types.txt written;", "smallest reachable file"]),
    ],
)
def test_a_dry_run_says_what_it_wrote(capsys, more, said) -> None:
    print_fit(
        {
            "file_bytes": 9, "budget_bytes": 9, "floor_bytes": 5, "predicted_delta_nats": 0.1, "paths": {},
            "slope_nats_per_byte": None, "method": "bytecap", "plan": "1 w4g32", "seconds": 1.0, **more,
        }
    )  # fmt: skip
    found = " ".join(capsys.readouterr().out.split())
    assert all(words in found for words in said), found
