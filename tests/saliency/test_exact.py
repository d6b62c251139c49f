"""Exact sums: any order, any grouping, the same bits; what does not fit is an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.saliency.exact import COARSE, COARSE_BITS, ExactSums, Grid, SumOverflow


def test_grid_of_a_hand_worked_pilot():
    # Largest 3.0 <= 2^2. 4 addends take 2 of 62 bits, a float64 gives 52: min(60, 52) = 52 bits; 52 - 12 headroom - 2 = 38.
    grid = Grid.from_pilot({"a": torch.tensor([3.0, -1.0])}, num_addends=4, headroom_bits=12)
    assert grid == Grid({"a": 38}, 52)
    assert grid.quantise("a", torch.tensor([1.5]))["a"].tolist() == [int(1.5 * 2**38)]


def test_an_addend_above_the_fine_grid_goes_to_the_coarse_one_element_by_element():
    # The fine grid of the pilot above ends at 2^(52 - 38) = 16384; the coarse one has units of 2^(30 - 38).
    grid = Grid({"a": 38}, 52)
    value = torch.tensor([1.5, 2.0**20 + 2.0**-8, -(2.0**14)], dtype=torch.float64)
    fine, coarse = grid.quantise("a", value)["a"], grid.quantise("a", value)["a" + COARSE]
    assert fine.tolist() == [int(1.5 * 2**38), 0, -(2**52)]
    assert coarse.tolist() == [0, 2**28 + 1, 0]
    sums = ExactSums(grid)
    sums.add({"a": torch.ones(3, dtype=torch.float64)})
    sums.add({"a": value})
    assert sums.values()["a"].tolist() == [2.5, 2.0**20 + 2.0**-8 + 1, -(2.0**14) + 1]


def test_a_silent_statistic_takes_the_grid_of_its_kind():
    pilot = {"abs/x": torch.zeros(2).double(), "abs/y": torch.tensor([8.0]), "sum/z": torch.tensor([1.0])}
    grid = Grid.from_pilot(pilot, num_addends=2)
    assert grid.exponents["abs/x"] == grid.exponents["abs/y"]
    assert grid.exponents["sum/z"] == grid.exponents["abs/y"] + 3


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.randoms())
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
    assert straight.values()["a"][0].item() == pytest.approx(
        sum(values), abs=len(values) * 2.0 ** (COARSE_BITS - grid.exponents["a"])
    )


@pytest.mark.parametrize("value", [1e13, float("inf"), float("nan")])
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
    with pytest.raises(ValueError, match="rows_per_unit"):
        Grid.from_pilot({"a": torch.ones(1)}, num_addends=2**40, headroom_bits=12)
