"""Amounts as people read them."""

import pytest

from wan_model.system.units import format_bytes, format_seconds


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1_310_000, "1.31 MB"),
        (28_400_000_000, "28.4 GB"),
        (5.2e12, "5.2 TB"),
        (7.1e15, "7.1e+03 TB"),
    ],
)
def test_bytes_have_decimal_units(count: float, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (123, "2 min 03 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (172_770, "2.0 days"),
        (302_400, "3.5 days"),
    ],
)
def test_durations_have_one_or_two_units(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
