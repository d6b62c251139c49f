"""What every source of rows has in common: rows with a place, in row groups that are read whole or in parts."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import numpy as np


class DataError(ValueError):
    """A data set cannot be used as it is; the message names the path, what is wrong and the way out."""


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Where a row lies."""

    file: str
    row_group: int
    row: int
    """Index in the file; in an image folder, index in the source."""

    def __str__(self) -> str:
        return f"{self.file}, row {self.row} (row group {self.row_group})"


@dataclass(frozen=True, slots=True)
class Row:
    """One image as it is stored. `None` stands for a null in the data: what to do about it is the reader's choice."""

    image: bytes | None
    label: int | None
    where: RowPlace


@dataclass(frozen=True)
class RowGroups:
    """How the rows of a source lie: one entry for each row group, in the order of the source. G = row groups."""

    file: np.ndarray
    """int32 [G]: index of the file."""
    group: np.ndarray
    """int32 [G]: index of the row group in its file."""
    num_rows: np.ndarray
    """int64 [G]."""

    def __len__(self) -> int:
        return len(self.num_rows)

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [G + 1]: rows before each row group; the last entry is the number of all rows."""
        return np.concatenate([[0], np.cumsum(self.num_rows, dtype=np.int64)])

    @property
    def total_rows(self) -> int:
        return int(self.starts[-1])


class Group(Protocol):
    """One row group in memory, still encoded."""

    def rows(self, start: int, stop: int) -> list[Row]:
        """Rows start..stop, counted from the beginning of the row group."""
        ...


class GroupCache:
    """The row group read last, for one process. A copy sent elsewhere starts empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: tuple[tuple[int, int], Group] | None = None

    def get(self, source: Source, file: int, row_group: int) -> Group:
        with self._lock:  # held while reading: two threads that want the same row group read it once
            if self._last is None or self._last[0] != (file, row_group):
                self._last = None  # let go of the old one first
                self._last = ((file, row_group), source.load(file, row_group))
            return self._last[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return GroupCache, ()


@dataclass(eq=False)
class Source(ABC):
    """Rows in a fixed order. Cheap to pickle; opens its files when they are first read."""

    row_groups: RowGroups
    fingerprint: str
    """sha256 over footers or names, file sizes, row counts and columns; not over the place where the files lie."""
    _cache: GroupCache = field(default_factory=GroupCache, init=False, repr=False)

    @property
    def num_rows(self) -> int:
        return self.row_groups.total_rows

    @abstractmethod
    def load(self, file: int, row_group: int) -> Group:
        """Read one row group whole. The caller decides how long to keep it."""

    def read(self, file: int, row_group: int, start: int, stop: int) -> list[Row]:
        """Rows start..stop of a row group. Parts of one row group that are read one after the other read it once."""
        return self._cache.get(self, file, row_group).rows(start, stop)


def layout(num_rows_per_file: Sequence[Sequence[int]]) -> RowGroups:
    """RowGroups of files that lie one after the other, from the number of rows of each of their row groups."""
    counts = [len(groups) for groups in num_rows_per_file]
    return RowGroups(
        file=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        group=np.concatenate([np.arange(count, dtype=np.int32) for count in counts] or [np.zeros(0, np.int32)]),
        num_rows=np.array([rows for groups in num_rows_per_file for rows in groups], dtype=np.int64),
    )
