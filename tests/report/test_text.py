"""Figures as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.report import text


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.000 k"),
        (999_990, "1.000 M"),
        (60_192_808, "60.19 M"),
        (11_513_624_576, "11.51 G"),
    ],
)
def test_counts_have_four_digits(value, shown):
    assert text.count(value) == shown


@pytest.mark.parametrize(("value", "shown"), [(999, "999 B"), (13_668_429, "13.67 MB"), (2_470_000_000, "2.470 GB")])
def test_bytes_are_counted_in_thousands(value, shown):
    assert text.num_bytes(value) == shown


@given(st.integers(0, 10**14))
def test_a_count_never_reaches_the_next_unit(value):
    assert float(text.count(value).split()[0].replace(",", "")) < 1000


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (119.7, "2 min 00 s"),
        (3599.6, "1 h 00 min"),
        (26420, "7 h 20 min"),
    ],
)
def test_durations_carry_over(seconds, shown):
    assert text.duration(seconds) == shown


@pytest.mark.parametrize(
    ("ms", "shown"), [(9.84, "9.84 ms"), (9.996, "10.0 ms"), (0.0412, "0.04 ms"), (1204.4, "1,204 ms")]
)
def test_latencies_have_three_digits(ms, shown):
    assert text.milliseconds(ms) == shown


@pytest.mark.parametrize(
    "shown",
    [text.percent, text.count, text.num_bytes, text.whole, text.milliseconds, text.duration, text.rate, text.small],
    ids=lambda f: f.__name__,
)
def test_unknown_is_a_dash_and_zero_is_a_zero(shown):
    assert shown(None) == "–"
    assert shown(0) != "–"
    assert "0" in shown(0)


def test_differences_have_a_sign():
    assert text.points(0.8157, 0.8228) == "−0.71"
    assert text.points(0.97, 0.95) == "+2.00"
    assert text.points(0.5, 0.5) == "±0.00"
    assert text.points(None, 0.5) == ""


def test_ratios_without_a_dense_figure_are_left_out():
    assert text.share(1.0, None) == text.share(1.0, 0) == text.speedup(0.0, 1.0) == ""
    assert text.share(5.0, 20.0) == "25.0 %"
    assert text.speedup(5.0, 20.0) == "4.00×"


def test_small_numbers_are_powers_of_ten():
    assert text.small(1.19e-6) == "1.2·10⁻⁶"


@given(st.text(min_size=1, max_size=60), st.integers(4, 40))
def test_a_shortened_name_fits(name, length):
    short = text.shorten(name, length)
    assert len(short) <= max(length, 1)
    assert short[0] == name[0]
    assert short[-1] == name[-1]
