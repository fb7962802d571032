"""Formats by their words and suffixes."""

import pytest

from bytecap.errors import UsageError
from bytecap.job.config import FitConfig
from bytecap.pipeline.formats import format_of


def test_formats_by_name() -> None:
    assert format_of(FitConfig("1MB", output="x.bcap")) == "bcap"
    assert format_of(FitConfig("1MB", output="x.gguf")) == "gguf"
    with pytest.raises(UsageError, match="there are bcap, gguf, mlx, compressed-tensors"):
        format_of(FitConfig("1MB", format="awq"))


@pytest.mark.parametrize(
    ("kind", "output", "said"),
    [
        (
            "gguf",
            "x.bcap",
            "x.bcap is named like the format bcap, but the format is gguf: name a file that ends",
        ),
        (
            "bcap",
            "x.gguf",
            "named like the format gguf, but the format is bcap: name a file that ends in .bcap",
        ),
        ("mlx", "x.gguf", "named like the format gguf, but the format is mlx: name a directory"),
        ("compressed-tensors", "x.bcap", "the format is compressed-tensors: name a directory"),
    ],
)
def test_a_suffix_of_another_format_is_refused(kind, output, said) -> None:
    with pytest.raises(UsageError, match=said):
        format_of(FitConfig("1MB", format=kind, output=output))
    for other in (f"x.{kind}", "x", "x.bin", None):
        assert format_of(FitConfig("1MB", format=kind, output=other)) == kind
