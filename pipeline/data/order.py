"""The order of training: which rows form which step, for any number of workers, found at any step without a replay.

An epoch's sequence is the source's row groups in shuffled order. It is cut into `num_streams` equal contiguous
pieces, the streams. Inside a stream rows are shuffled within windows, and a step takes the same number of rows from
every stream. A worker reads whole streams, so it reads each of its row groups once; the number of workers decides who
reads a stream and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pipeline.data.source import RowGroups

_GOLDEN = 0x9E3779B97F4A7C15


def mix(*values: int | np.ndarray) -> np.ndarray:
    """uint64 hash of integers, elementwise, broadcast. Unlike a library's generator it is the same for ever.

    Source: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators" (SplitMix64), OOPSLA 2014.
    """
    state = np.zeros(1, dtype=np.uint64)
    for value in values:
        words = np.atleast_1d(np.asarray(value)).astype(np.int64).astype(np.uint64)
        state = (state ^ words) + np.uint64(_GOLDEN)  # arrays wrap around without a warning
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state = state ^ (state >> np.uint64(31))
    return state


def shuffled(count: int, *key: int) -> np.ndarray:
    """int64 [count]: a permutation that depends on `key` alone."""
    return np.argsort(mix(*key, np.arange(count)), kind="stable")


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled among themselves, of one stream. n = rows of the window."""

    first: int
    """Position in the stream of its first row."""
    group_n: np.ndarray
    """int64 [n]: index into the source's RowGroups, in training order."""
    row_n: np.ndarray
    """int64 [n]: row in its row group."""
    global_row_n: np.ndarray
    """int64 [n]: row in the source."""

    def __len__(self) -> int:
        return len(self.row_n)


class TrainingOrder:
    """Which rows form which step of which epoch.

    Args:
        row_groups: of the source.
        num_streams: pieces of the sequence; the largest possible number of workers. Part of the order, so fix it once.
        global_batch: rows in one step, over all workers; a multiple of num_streams.
        seed: of the shuffling.
        window: rows that are shuffled among themselves; what a stream holds in memory.

    Each row comes at most once in an epoch; the rest of a division by the batch (fewer than global_batch rows) comes
    not at all, other rows each epoch.
    """

    def __init__(
        self, row_groups: RowGroups, num_streams: int, global_batch: int, seed: int = 0, window: int = 1024
    ) -> None:
        if num_streams < 1 or global_batch < 1 or window < 1:
            raise ValueError(
                f"num_streams ({num_streams}), global_batch ({global_batch}) and window ({window}) must be at least 1."
            )
        if global_batch % num_streams:
            raise ValueError(
                f"global_batch ({global_batch}) must be a multiple of num_streams ({num_streams}), so that each "
                "stream gives the same "
                "number of rows to a step. Change one of the two."
            )
        if row_groups.total_rows < global_batch:
            raise ValueError(
                f"the source has {row_groups.total_rows} rows, fewer than one step's global_batch ({global_batch}). "
                "Lower batch_size."
            )
        self.row_groups = row_groups
        self.num_streams = num_streams
        self.global_batch = global_batch
        self.seed = seed
        self.window_rows = window
        self.rows_per_stream_step = global_batch // num_streams
        self.steps_per_epoch = row_groups.total_rows // global_batch
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def streams(self, rank: int, world_size: int) -> range:
        """The streams of one worker: neighbours, dealt as evenly as possible."""
        if world_size > self.num_streams:
            raise ValueError(
                f"{world_size} workers for {self.num_streams} streams: some would have no rows. Use at most "
                f"{self.num_streams} workers, "
                "or raise num_streams in a new run."
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank ({rank}) must lie in 0..{world_size - 1}.")
        return range(rank * self.num_streams // world_size, (rank + 1) * self.num_streams // world_size)

    def stream_border(self, stream: int) -> int:
        """Position in the epoch's sequence where a stream begins."""
        return stream * self.row_groups.total_rows // self.num_streams

    def window_of(self, stream: int, position: int) -> int:
        """Index of the window that holds a position of a stream. Windows of different streams end at different steps,
        so that not all streams read at the same moment."""
        return (position + self._shift(stream)) // self.window_rows

    def window(self, epoch: int, stream: int, index: int) -> Window:
        """One window, shuffled. Found without looking at those before it."""
        begin, end = self.stream_border(stream), self.stream_border(stream + 1)
        first = max(0, index * self.window_rows - self._shift(stream))
        stop = min(end - begin, (index + 1) * self.window_rows - self._shift(stream))
        positions = begin + first + shuffled(stop - first, self.seed, epoch, stream, index)
        order, starts = self._sequence(epoch)
        place = np.searchsorted(starts, positions, side="right") - 1
        group, row = order[place], positions - starts[place]
        return Window(first, group, row, self.row_groups.starts[group] + row)

    def rows(self, epoch: int, step: int, stream: int) -> np.ndarray:
        """int64 [global_batch / num_streams]: rows of the source that a stream gives to a step, in order."""
        first = step * self.rows_per_stream_step
        positions = range(first, first + self.rows_per_stream_step)
        windows = range(self.window_of(stream, positions[0]), self.window_of(stream, positions[-1]) + 1)
        parts = [self.window(epoch, stream, index) for index in windows]
        joined = np.concatenate([part.global_row_n for part in parts])
        return joined[first - parts[0].first :][: self.rows_per_stream_step]

    def sequence_index(self, epoch: int) -> np.ndarray:
        """int64 [G]: place of each row group in the epoch's sequence."""
        order, _ = self._sequence(epoch)
        index = np.empty_like(order)
        index[order] = np.arange(len(order))
        return index

    def _shift(self, stream: int) -> int:
        return stream * self.window_rows // self.num_streams

    def _sequence(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's row groups in order, and the position of each one's first row."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = shuffled(len(self.row_groups), self.seed, epoch, -1)
            starts = np.concatenate([[0], np.cumsum(self.row_groups.num_rows[order], dtype=np.int64)])[:-1]
            # Row groups without rows have the start of their successor: searchsorted from the right passes over them.
            self._epoch = (epoch, order, starts)
        return self._epoch[1], self._epoch[2]
