"""Units: which rows, by hand and for any layout."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.source import RowGroups, layout
from pipeline.data.units import Unit, Units
from tests.data.making import row_groups

LAYOUTS = st.lists(st.lists(st.integers(0, 30), max_size=6), min_size=1, max_size=4)


def rows_of(units, groups):
    """Every row of the source that the units name, as (file, row group, row)."""
    return [(u.file, u.row_group, row) for u in units for row in range(u.start, u.stop)]


def test_units_of_two_files_by_hand():
    units = Units(layout([[5, 2], [3]]), rows_per_unit=2)
    assert list(units) == [
        Unit(0, 0, 0, 0, 2),
        Unit(1, 0, 0, 2, 4),
        Unit(2, 0, 0, 4, 5),
        Unit(3, 0, 1, 0, 2),
        Unit(4, 1, 0, 0, 2),
        Unit(5, 1, 0, 2, 3),
    ]
    assert units[-1] == units[5]
    assert units.describe() == {"rows_per_unit": 2, "num_rows": 10, "num_units": 6}


def test_a_part_of_the_rows_is_spread_evenly_and_exact():
    units = Units(row_groups(4, 4, 4, 4), rows_per_unit=2, num_rows=7)  # 8 units; 4 of them: 0, 2, 4, 6
    assert [(u.row_group, u.start, u.stop) for u in units] == [(0, 0, 2), (1, 0, 2), (2, 0, 2), (3, 0, 1)]
    assert [u.id for u in units] == [0, 1, 2, 3]
    assert units.num_rows == 7


def test_row_groups_without_rows_have_no_units():
    assert [u.row_group for u in Units(row_groups(0, 3, 0, 0, 1, 0), rows_per_unit=2)] == [1, 1, 4]


@given(LAYOUTS, st.integers(1, 40))
def test_every_row_is_in_exactly_one_unit(sizes, rows_per_unit):
    groups = layout(sizes)
    units = Units(groups, rows_per_unit)
    every = [(f, g, row) for f, file in enumerate(sizes) for g, size in enumerate(file) for row in range(size)]
    assert rows_of(units, groups) == every
    assert all(0 < u.num_rows <= rows_per_unit for u in units)


@given(LAYOUTS.filter(lambda sizes: sum(map(sum, sizes)) > 0), st.integers(1, 40), st.data())
def test_a_part_has_exactly_the_rows_asked_for_none_twice(sizes, rows_per_unit, data):
    groups = layout(sizes)
    num_rows = data.draw(st.integers(1, groups.total_rows))
    units = Units(groups, rows_per_unit, num_rows)
    rows = rows_of(units, groups)
    assert len(rows) == len(set(rows)) == num_rows == units.num_rows
    whole = {(u.file, u.row_group, u.start): u.stop for u in Units(groups, rows_per_unit)}
    assert all(whole[u.file, u.row_group, u.start] == u.stop for u in list(units)[:-1])


def test_units_for_400_million_rows_are_made_when_asked_for():
    groups = RowGroups(np.zeros(1_600_000, np.int32), np.arange(1_600_000, dtype=np.int32), np.full(1_600_000, 256))
    units = Units(groups, rows_per_unit=256)
    assert len(units) == 1_600_000
    assert units[1_234_567] == Unit(1_234_567, 0, 1_234_567, 0, 256)
    assert units[1_234_567] == pickle.loads(pickle.dumps(units))[1_234_567]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"rows_per_unit \(0\)"):
        Units(row_groups(4), 0)
    with pytest.raises(ValueError, match=r"num_rows \(5\) must lie between 1 and the 4 rows"):
        Units(row_groups(4), 2, 5)
    with pytest.raises(IndexError):
        Units(row_groups(4), 2)[2]
