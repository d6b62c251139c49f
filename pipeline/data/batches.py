"""Micro-batches of a unit, decoded by background threads a little ahead of their use.

The borders of the micro-batches are row positions: a row that is skipped makes its micro-batch smaller and shifts no
other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.data.images import Decoder, NotAnImage
from pipeline.data.source import Row, Source
from pipeline.data.units import Unit

__all__ = ["BadRow", "BadRowError", "Batch", "Decoder", "unit_batches"]

ON_BAD_ROW = ("stop", "skip")
BATCHES_AHEAD = 2
"""Micro-batches that are decoded, or being decoded, beside the one in use."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    file: str
    row_group: int
    row: int
    """Index in the file."""
    cause: str


class BadRowError(ValueError):
    """A row cannot be used, and the policy is to stop. Survives pickling."""

    def __init__(self, file: str, row_group: int, row: int, cause: str) -> None:
        super().__init__(
            f"{file}, row {row} (row group {row_group}): {cause}. Repair the row, or set data.on_bad_row=skip to "
            "leave such rows out."
        )
        self.file, self.row_group, self.row, self.cause = file, row_group, row, cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.row_group, self.row, self.cause)

    @classmethod
    def of(cls, bad: BadRow) -> BadRowError:
        return cls(bad.file, bad.row_group, bad.row, bad.cause)


@dataclass(frozen=True)
class Batch:
    """One micro-batch. N may be smaller than asked for, even 0, when rows were skipped."""

    images_NCHW: Tensor
    """float32, channels_last: as decoders write pixels, and as the networks of a pass want them."""
    labels_N: Tensor
    """int64."""
    bad_rows: tuple[BadRow, ...] = ()

    @classmethod
    def empty(cls, size: int) -> Batch:
        """Without a row."""
        return cls(torch.zeros(0, 3, size, size), torch.zeros(0, dtype=torch.int64))

    def pinned(self) -> Batch:
        """In page-locked memory, from where a copy to a GPU does not make the process wait."""
        return Batch(self.images_NCHW.pin_memory(), self.labels_N.pin_memory(), self.bad_rows)


def require_policy(on_bad_row: str) -> None:
    if on_bad_row not in ON_BAD_ROW:
        raise ValueError(f"on_bad_row is {on_bad_row!r}. Known: {', '.join(ON_BAD_ROW)}.")


def use_row(row: Row, num_classes: int, decode: Callable[[bytes], None]) -> BadRow | None:
    """Check a row and give its bytes to `decode`. Returns why it cannot be used, if so."""
    if row.label is None:
        cause = "the label is null"
    elif not 0 <= row.label < num_classes:
        cause = f"label {row.label} is not in 0..{num_classes - 1}"
    elif row.image is None:
        cause = "the image is null"
    else:
        try:
            decode(row.image)
            return None
        except NotAnImage as error:
            cause = str(error)
    return BadRow(row.where.file, row.where.row_group, row.where.row, cause)


def unit_batches(
    source: Source,
    unit: Unit,
    decoder: Decoder,
    *,
    micro_batch: int,
    num_classes: int,
    on_bad_row: str = "stop",
    threads: int = 1,
    share: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """The micro-batches of one unit in row order: rows 0..micro_batch of the unit, then the next ones.

    Memory: three micro-batches and one encoded row group, for units and data of any length. Closing the generator
    ends its threads.

    Args:
        micro_batch: rows in one batch; the last one of a unit has what is left.
        num_classes: labels must lie in 0..num_classes - 1.
        on_bad_row: "stop" raises, "skip" leaves the row out and lists it in the batch.
        threads: background threads that decode; 0 decodes in the caller's. Changes no bit.
        share: (i, n): only micro-batches i, i + n, i + 2n ... are decoded and given.

    Raises:
        BadRowError: with "stop", for the first bad row in the unit's order.
        DataError, OSError: the row group cannot be read.
    """
    require_policy(on_bad_row)
    if micro_batch < 1:
        raise ValueError(f"micro_batch ({micro_batch}) must be at least 1.")
    rows = source.read(unit.file, unit.row_group, unit.start, unit.stop)
    chunks = [rows[first : first + micro_batch] for first in range(0, len(rows), micro_batch)]
    chunks = chunks[share[0] :: share[1]]
    if threads == 0:
        for chunk in chunks:
            yield _finish(_Pending(chunk, decoder, num_classes), on_bad_row)
        return
    executor = ThreadPoolExecutor(threads, thread_name_prefix="decode")
    try:
        ahead: deque[_Pending] = deque()
        for chunk in chunks:
            ahead.append(_Pending(chunk, decoder, num_classes, executor, threads))
            if len(ahead) > BATCHES_AHEAD:
                yield _finish(ahead.popleft(), on_bad_row)
        while ahead:
            yield _finish(ahead.popleft(), on_bad_row)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


class _Pending:
    """A micro-batch whose rows are being decoded."""

    def __init__(
        self, rows: list[Row], decoder: Decoder, num_classes: int, executor: Executor | None = None, threads: int = 1
    ) -> None:
        self.rows = rows
        shape = (len(rows), 3, decoder.size, decoder.size)
        self.images = torch.empty(shape, memory_format=torch.channels_last)
        self._decoder = decoder
        self._num_classes = num_classes
        self._jobs: list[Future[list[BadRow | None]]] = []
        if executor is None:
            self._bad = self._decode(0, len(rows))
            return
        share = -(
            -len(rows) // (2 * threads)
        )  # two shares for each thread: a large image holds up half a share at most
        self._jobs = [executor.submit(self._decode, first, first + share) for first in range(0, len(rows), share)]

    def _decode(self, start: int, stop: int) -> list[BadRow | None]:
        def one(index: int) -> BadRow | None:
            return use_row(
                self.rows[index], self._num_classes, lambda data: self._decoder.decode_into_(self.images[index], data)
            )

        return [one(index) for index in range(start, min(stop, len(self.rows)))]

    def bad(self) -> list[BadRow | None]:
        return [bad for job in self._jobs for bad in job.result()] if self._jobs else self._bad


def _finish(pending: _Pending, on_bad_row: str) -> Batch:
    bad = pending.bad()
    found = tuple(row for row in bad if row is not None)
    if not found:
        return Batch(pending.images, torch.tensor([row.label for row in pending.rows], dtype=torch.int64))
    if on_bad_row == "stop":
        raise BadRowError.of(found[0])
    good = [index for index, row in enumerate(bad) if row is None]
    labels = torch.tensor([pending.rows[index].label for index in good], dtype=torch.int64)
    return Batch(pending.images[good], labels, found)
