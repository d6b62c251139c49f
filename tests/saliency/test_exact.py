"""Exact sums: any order, any grouping, the same bits; what does not fit is an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.saliency.exact import ExactSums, Grid, SumOverflow


def test_grid_of_a_hand_worked_pilot():
    # Largest 3.0 <= 2^2. 4 addends take 2 of 62 bits, a float64 gives 52: min(60, 52) = 52 bits; 52 - 12 headroom - 2 = 38.
    grid = Grid.from_pilot({"a": torch.tensor([3.0, -1.0])}, num_addends=4, headroom_bits=12)
    assert grid == Grid({"a": 38}, 52)
    assert grid.quantise("a", torch.tensor([1.5])).tolist() == [int(1.5 * 2**38)]


def test_a_silent_statistic_takes_the_grid_of_its_kind():
    pilot = {"abs/x": torch.zeros(2).double(), "abs/y": torch.tensor([8.0]), "sum/z": torch.tensor([1.0])}
    grid = Grid.from_pilot(pilot, num_addends=2)
    assert grid.exponents["abs/x"] == grid.exponents["abs/y"]
    assert grid.exponents["sum/z"] == grid.exponents["abs/y"] + 3


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.randoms())
def test_order_and_grouping_do_not_change_a_bit(values, rnd):
    addends = [{"a": torch.tensor([v, -v / 3], dtype=torch.float64), "n": torch.tensor(1)} for v in values]
    grid = Grid.from_pilot({"a": torch.tensor([1.0], dtype=torch.float64)}, num_addends=64)
    straight = ExactSums(grid)
    for addend in addends:
        straight.add(addend)
    shuffled = addends[:]
    rnd.shuffle(shuffled)
    cut = rnd.randint(0, len(addends))
    left, right = ExactSums(grid), ExactSums(grid)
    for addend in shuffled[:cut]:
        left.add(addend)
    for addend in shuffled[cut:]:
        right.add(addend)
    right.merge(left.totals)
    assert {k: v.tolist() for k, v in straight.totals.items()} == {k: v.tolist() for k, v in right.totals.items()}
    assert straight.values()["n"].item() == len(values)
    assert straight.values()["a"][0].item() == pytest.approx(sum(values), abs=len(values) * 2.0 ** -grid.exponents["a"])


@pytest.mark.parametrize("value", [9000.0, float("inf"), float("nan")])
def test_an_addend_outside_the_grid_is_an_error_and_never_a_wrap(value):
    sums = ExactSums(Grid.from_pilot({"a": torch.tensor([1.0])}, num_addends=4))
    with pytest.raises(SumOverflow, match="statistic 'a'"):
        sums.add({"a": torch.tensor([value])})


def test_a_sum_that_leaves_int64_is_an_error():
    sums = ExactSums(Grid({"a": 0}, 62))
    sums.add_quantised("a", torch.tensor([2**62]))
    with pytest.raises(SumOverflow, match="int64"):
        sums.add_quantised("a", torch.tensor([2**62]))


def test_a_pilot_of_nans_blames_the_network():
    with pytest.raises(SumOverflow, match="pilot"):
        Grid.from_pilot({"a": torch.tensor([float("nan")])}, num_addends=4)


def test_too_many_addends_for_the_headroom_say_so():
    with pytest.raises(ValueError, match="headroom_bits"):
        Grid.from_pilot({"a": torch.ones(1)}, num_addends=2**40, headroom_bits=12)
