"""Units of work: fixed ranges of rows inside row groups. Pure arithmetic; nothing here depends on who does the work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.data.source import RowGroups

STRIDES = (2, 4, 8, 16)
"""Nested samples of a source: every 2nd, 4th ... unit. Each is half of the one before, whoever computes it."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows start..stop of one row group."""

    id: int
    """Index in its Units."""
    file: int
    row_group: int
    start: int
    """Counted from the beginning of the row group."""
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


class Units:
    """The units of a source, each made when asked for: memory grows with row groups, not with units.

    Every row group is cut into units of `rows_per_unit` rows; its last one has what is left.

    Args:
        row_groups: of the source.
        rows_per_unit: most rows in one unit.
        num_rows: take exactly so many rows, in whole units spread evenly over the source; the last one is shortened.
            None: all.

    Raises:
        ValueError: rows_per_unit below 1; num_rows below 1 or above what there is.
    """

    def __init__(self, row_groups: RowGroups, rows_per_unit: int, num_rows: int | None = None) -> None:
        if rows_per_unit < 1:
            raise ValueError(f"rows_per_unit ({rows_per_unit}) must be at least 1.")
        self.rows_per_unit = rows_per_unit
        self._row_groups = row_groups
        # first[g] = units before row group g
        self._first = np.concatenate([[0], np.cumsum(-(-row_groups.num_rows // rows_per_unit), dtype=np.int64)])
        self._all = int(self._first[-1])
        self._spread, self._len, self._last_cut = self._all, self._all, 0
        self.num_rows = row_groups.total_rows
        if num_rows is not None:
            if not 1 <= num_rows <= row_groups.total_rows:
                raise ValueError(
                    f"num_rows ({num_rows}) must lie between 1 and the {row_groups.total_rows} rows of the source. "
                    "Leave it empty to take all."
                )
            self._spread, self._len, self._last_cut = self._choose(num_rows)
            self.num_rows = num_rows

    def _choose(self, num_rows: int) -> tuple[int, int, int]:
        """Over how many evenly spread units to go, how many of them to take, and how many rows of the last are too
        many."""
        spread = min(self._all, -(-num_rows // self.rows_per_unit))
        while True:  # row groups end in shorter units, so a few more may be needed
            _, start, stop = self._ranges(np.arange(spread, dtype=np.int64) * self._all // spread)
            rows = np.cumsum(stop - start)
            missing = num_rows - int(rows[-1])
            if missing <= 0:
                length = int(np.searchsorted(rows, num_rows)) + 1
                return spread, length, int(rows[length - 1]) - num_rows
            spread = min(self._all, spread + max(1, missing // self.rows_per_unit))

    def _ranges(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row group, start and stop of units of the whole source."""
        group = np.searchsorted(self._first, ids, side="right") - 1
        start = (ids - self._first[group]) * self.rows_per_unit
        return group, start, np.minimum(start + self.rows_per_unit, self._row_groups.num_rows[group])

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> Unit:
        if not -self._len <= index < self._len:
            raise IndexError(f"unit {index} of {self._len}")
        index %= self._len
        group, start, stop = (int(value[0]) for value in self._ranges(np.array([index * self._all // self._spread])))
        if index == self._len - 1:
            stop -= self._last_cut
        return Unit(index, int(self._row_groups.file[group]), int(self._row_groups.group[group]), start, stop)

    def __iter__(self) -> Iterator[Unit]:
        return (self[index] for index in range(self._len))

    def describe(self) -> dict[str, Any]:
        """What decides the split, besides the source itself: for fingerprints."""
        return {"rows_per_unit": self.rows_per_unit, "num_rows": self.num_rows, "num_units": self._len}
