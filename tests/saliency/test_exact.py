"""Exact sums: any order, any grouping, the same bits; what does not fit is an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.saliency.exact import COARSE, COARSE_BITS, ExactSums, Grid, SumOverflow, magnitudes


def test_grid_of_a_hand_worked_pilot():
    # Largest 3.0 <= 2^2. 4 addends take 2 of 62 bits, a float64 gives 52: min(60, 52) = 52 bits; 52 - 12 headroom - 2 = 38.
    grid = Grid.from_pilot({"a": [3.0]}, num_addends=4, headroom_bits=12)
    assert grid == Grid({"a": [38]}, 52)
    assert grid.quantise("a", torch.tensor([1.5]))["a"].tolist() == [int(1.5 * 2**38)]


def test_an_addend_above_the_fine_grid_goes_to_the_coarse_one_element_by_element():
    # The fine grid of the pilot above ends at 2^(52 - 38) = 16384; the coarse one has units of 2^(30 - 38).
    grid = Grid({"a": [38]}, 52)
    value = torch.tensor([1.5, 2.0**20 + 2.0**-8, -(2.0**14)], dtype=torch.float64)
    fine, coarse = grid.quantise("a", value)["a"], grid.quantise("a", value)["a" + COARSE]
    assert fine.tolist() == [int(1.5 * 2**38), 0, -(2**52)]
    assert coarse.tolist() == [0, 2**28 + 1, 0]
    sums = ExactSums(grid)
    sums.add({"a": torch.ones(3, dtype=torch.float64)})
    sums.add({"a": value})
    assert sums.values()["a"].tolist() == [2.5, 2.0**20 + 2.0**-8 + 1, -(2.0**14) + 1]


def test_a_silent_statistic_takes_the_grid_of_its_kind():
    pilot = {"abs/x": [0.0], "abs/y": [8.0], "sum/z": [1.0]}
    grid = Grid.from_pilot(pilot, num_addends=2)
    assert grid.exponents["abs/x"] == grid.exponents["abs/y"]
    assert grid.exponents["sum/z"] == [grid.exponents["abs/y"][0] + 3]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.randoms())
def test_order_and_grouping_do_not_change_a_bit(values, rnd):
    addends = [{"a": torch.tensor([v, -v / 3], dtype=torch.float64), "n": torch.tensor(1)} for v in values]
    grid = Grid.from_pilot({"a": [1.0]}, num_addends=64)
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
        sum(values), abs=len(values) * 2.0 ** (COARSE_BITS - grid.exponents["a"][0])
    )


@pytest.mark.parametrize("value", [1e13, float("inf"), float("nan")])
def test_an_addend_outside_the_grid_is_an_error_and_never_a_wrap(value):
    sums = ExactSums(Grid.from_pilot({"a": [1.0]}, num_addends=4))
    with pytest.raises(SumOverflow, match="statistic 'a'"):
        sums.add({"a": torch.tensor([value])})


def test_a_sum_that_leaves_int64_is_an_error():
    sums = ExactSums(Grid({"a": [0]}, 62))
    sums.add_quantised("a", torch.tensor([2**62]))
    with pytest.raises(SumOverflow, match="int64"):
        sums.add_quantised("a", torch.tensor([2**62]))


def test_a_pilot_of_nans_blames_the_network():
    with pytest.raises(SumOverflow, match="pilot"):
        Grid.from_pilot(magnitudes({"a": torch.tensor([float("nan"), 1.0])}), num_addends=4)


def test_too_many_addends_for_the_headroom_say_so():
    with pytest.raises(ValueError, match="rows_per_unit"):
        Grid.from_pilot({"a": [1.0]}, num_addends=2**40, headroom_bits=12)


def test_magnitudes_by_segment_and_none_for_counts():
    sums = {"a": torch.tensor([1.0, -3.0, 0.5]), "n": torch.tensor(7), "s": torch.tensor(-2.0), "e": torch.zeros(0)}
    assert magnitudes(sums, {"a": (2, 1)}) == {"a": [3.0, 0.5], "s": [2.0], "e": [0.0]}


def test_segments_of_one_statistic_have_grids_of_their_own():
    # 52 - 12 = 40 bits: 3.0 <= 2^2 and 0.5 <= 2^-0; a silent segment takes the coarsest of its kind.
    segments = {"a": (2, 1, 1)}
    grid = Grid.from_pilot({"a": [3.0, 0.4, 0.0]}, num_addends=4, segments=segments)
    assert grid.exponents["a"] == [38, 41, 38]
    sums = ExactSums(grid)
    for _ in range(2):
        sums.add({"a": torch.tensor([1.5, -1.0, 0.25, 2.0], dtype=torch.float64)})
    assert sums.totals["a"].tolist() == [3 << 38, -(2 << 38), 1 << 40, 4 << 38]
    assert sums.values()["a"].tolist() == [3.0, -2.0, 0.5, 4.0]


def test_strides_add_the_same_bits_under_their_own_names():
    grid = Grid({"a": [38]}, 52)
    sums = ExactSums(grid)
    sums.add({"a": torch.tensor([1.0]), "b": torch.tensor(5)}, strides=(2, 4), nested=frozenset({"a"}))
    sums.add({"a": torch.tensor([2.0**15]), "b": torch.tensor(5)}, strides=(2,), nested=frozenset({"a"}))
    sums.add({"a": torch.tensor([8.0]), "b": torch.tensor(5)}, nested=frozenset({"a"}))
    values = sums.values()
    assert {name: value.reshape(-1).tolist() for name, value in values.items()} == {
        "a": [1 + 2.0**15 + 8],
        "a@2": [1 + 2.0**15],
        "a@4": [1.0],
        "b": [15],
    }


def test_a_sample_holds_nothing_of_other_units():
    sums = ExactSums(Grid({"a": [38]}, 52))
    nested = frozenset({"a", "n"})
    for unit in (0, 1, 2, 4, 8):
        strides = [stride for stride in (2, 4, 8) if unit % stride == 0]
        sums.add({"a": torch.tensor([2.0**unit]), "n": torch.tensor(1), "w": torch.tensor(1)}, strides, nested)
    values = {name: value.item() for name, value in sums.sample(4).values().items()}
    assert values == {"a": 1 + 16 + 256, "n": 3, "a@8": 1 + 256, "n@8": 2}


def test_more_addends_than_the_grid_was_made_for_are_refused():
    sums = ExactSums(Grid({"a": [0]}, 61))
    sums.add({"a": torch.tensor([1.0])})
    sums.add({"a": torch.tensor([1.0])})
    with pytest.raises(SumOverflow, match="more than 2 addends"):
        sums.add({"a": torch.tensor([1.0])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_statistic_in_any_memory_order_equals_the_plain_rounding(dtype):
    torch.manual_seed(0)
    value = torch.randn(300, 50, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)  # over one piece
    grid = Grid.from_pilot(magnitudes({"w": value}), num_addends=8)
    sums = ExactSums(grid)
    sums.add({"w": value})
    sums.add({"w": value})
    assert torch.equal(sums.totals["w"], 2 * grid.quantise("w", value)["w"])
