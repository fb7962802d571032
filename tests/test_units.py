"""Sizes as people type them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytecap import UsageError, format_size, parse_size

pytestmark = pytest.mark.coverage


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("3000000", 3_000_000), ("3_000_000", 3_000_000), ("3,000,000", 3_000_000), ("3MB", 3_000_000),
        ("3mb", 3_000_000), (" 3 MB ", 3_000_000), ("3MiB", 3 * 2**20), ("2.5MiB", 5 * 2**19), ("600kB", 600_000),
        ("600KiB", 600 * 2**10), ("1GB", 10**9), ("1GiB", 2**30), ("7B", 7), ("7", 7), (7, 7), ("0.5kB", 500),
    ],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MB",
        "3 megs",
        "-3MB",
        "-3",
        "+3",
        "3M B",
        "1e6",
        "nan",
        "inf",
        "0x10",
        "3MB 3MB",
        "3..5MB",
        ".5MB",
        "٣MB",
    ],
)
def test_what_is_no_size(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("size", ["0", "0MB", "0.0001kB", 0, -5])
def test_less_than_a_byte(size):
    with pytest.raises(UsageError, match="at least one byte"):
        parse_size(size)


@given(st.integers(1, 10**12))
def test_plain_numbers_are_bytes(count):
    assert parse_size(count) == parse_size(str(count)) == parse_size(f"{count:,}") == count


@given(st.integers(1, 10**6), st.sampled_from(["k", "M", "G"]))
def test_decimal_and_binary_units_never_mix(count, prefix):
    power = "kMG".index(prefix) + 1
    assert parse_size(f"{count}{prefix}B") == count * 1000**power
    assert parse_size(f"{count}{prefix}iB") == count * 1024**power


@given(st.integers(0, 10**12))
def test_both_units_are_shown(count):
    shown = format_size(count)
    assert shown.startswith(f"{count:,} bytes (")
    assert "MB, " in shown or "kB, " in shown
    assert "iB)" in shown


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_a_usage_error(text):
    try:
        assert parse_size(text) >= 1
    except UsageError as exc:
        assert repr(text) in str(exc) or text in str(exc)  # noqa: PT017 (either outcome is fine)
