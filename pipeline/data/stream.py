"""Training samples of one worker, in the order of `TrainingOrder`, augmented by random numbers that belong to the row.

The samples of a step depend on the seed, the epoch and the rows alone: not on the number of workers, not on the
number of loader processes, not on where training was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from pipeline.data.batches import BadRow, BadRowError, require_policy, use_row
from pipeline.data.images import Normalise, decode_rgb
from pipeline.data.order import TrainingOrder, mix
from pipeline.data.source import DataError, Group, Row, Source

__all__ = ["Augmentation", "Share", "TrainingLoader", "TrainingOrder", "TrainingRows", "training_loader"]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a training image, by timm's transforms on PIL images."""

    size: int
    """Height and width in pixels."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "random"
    """"random" draws bilinear or bicubic for each image."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Area of the random resized crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5
    """Probability of a mirror image."""
    color_jitter: float | None = None
    auto_augment: str | None = None
    """timm's policy string, for example rand-m9-mstd0.5-inc1."""
    random_erase: float = 0.0
    """Probability of erasing a rectangle."""


class Augment:
    """Bytes to float32 [3, size, size], with random numbers from a seed that comes with each image."""

    def __init__(self, settings: Augmentation) -> None:
        jitter: dict[str, Any] = {"color_jitter": settings.color_jitter or None}  # None, not 0, is timm's "off"
        self._transform: Callable[[Image.Image], Tensor] = create_transform(
            settings.size,
            is_training=True,
            scale=settings.scale,
            ratio=settings.ratio,
            hflip=settings.hflip,
            **jitter,
            auto_augment=settings.auto_augment,
            interpolation=settings.interpolation,
            mean=settings.mean,
            normalize=False,  # into the batch at once, below: five times faster than timm's on a copy
        )
        self._normalise = Normalise(tuple(settings.mean), tuple(settings.std))
        self._erase = RandomErasing(settings.random_erase, device="cpu") if settings.random_erase else None

    def into_(self, out_CHW: Tensor, data: bytes, seed: int) -> None:
        """Seeds the global generators: call inside `own_randomness`. Raises NotAnImage."""
        pixels = decode_rgb(data).permute(1, 2, 0).contiguous().numpy()
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs, too
        self._normalise.into_(out_CHW, self._transform(Image.fromarray(pixels)))
        if self._erase is not None:
            self._erase(out_CHW)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Whatever is drawn inside leaves the global generators (python, numpy, torch on the CPU) as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class Share:
    """What a block of streams gives to one step. n = rows of the block in a step, less the bad rows."""

    images_nCHW: Tensor
    labels_n: Tensor
    bad_rows: tuple[BadRow, ...]


def blocks_of(streams: range, processes: int) -> list[range]:
    """A worker's streams in blocks of neighbours, for loader processes that take turns: process j has block j modulo
    their number. As many blocks as processes, or, with fewer streams than processes, the largest divisor that fits:
    then several processes read the same block and make every second, third ... step of it."""
    count = max(d for d in range(1, processes + 1) if processes % d == 0 and d <= len(streams))
    borders = [i * len(streams) // count for i in range(count + 1)]
    return [streams[start:stop] for start, stop in pairwise(borders)]


class StreamReader:
    """The encoded rows of one stream, step after step. Holds one window and one row group, and reads the next window
    while the second half of this one is used."""

    def __init__(
        self, source: Source, order: TrainingOrder, epoch: int, stream: int, executor: ThreadPoolExecutor
    ) -> None:
        self._source, self._order, self._epoch, self._stream, self._executor = source, order, epoch, stream, executor
        self._last: tuple[int, Group] | None = None
        self._index = -1
        self._first = 0
        self._rows: list[tuple[int, Row] | None] = []
        self._next: tuple[int, Future[tuple[int, list[tuple[int, Row] | None]]]] | None = None

    def take(self, step: int) -> list[tuple[int, Row]]:
        """(row of the source, row) for each row of the stream's share of a step."""
        per_step = self._order.rows_per_stream_step
        return [self._take(position) for position in range(step * per_step, (step + 1) * per_step)]

    def _take(self, position: int) -> tuple[int, Row]:
        index = self._order.window_of(self._stream, position)
        if index != self._index:
            self._index, (self._first, self._rows) = index, self._window(index)
        offset = position - self._first
        item, self._rows[offset] = self._rows[offset], None  # each is taken once: its bytes are let go
        assert item is not None
        if 2 * offset >= len(self._rows) and self._next is None and self._has_window(index + 1):
            self._next = (index + 1, self._executor.submit(self._load, index + 1))
        return item

    def _has_window(self, index: int) -> bool:
        used = self._order.steps_per_epoch * self._order.rows_per_stream_step
        return self._order.window_of(self._stream, used - 1) >= index

    def _window(self, index: int) -> tuple[int, list[tuple[int, Row] | None]]:
        self._rows = []
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == index:
            return ahead[1].result()
        return self._executor.submit(self._load, index).result()

    def _load(self, index: int) -> tuple[int, list[tuple[int, Row] | None]]:
        window = self._order.window(self._epoch, self._stream, index)
        items: list[tuple[int, Row] | None] = [None] * len(window)
        # A window is a contiguous range of the sequence: of each row group it has one range of rows. In the order of
        # the sequence the last row group of this window is the first of the next one and is not read again.
        for group in self._in_sequence(window.group_n):
            places = np.flatnonzero(window.group_n == group)
            start, stop = int(window.row_n[places].min()), int(window.row_n[places].max()) + 1
            rows = self._group(group).rows(start, stop)
            for place in places.tolist():
                items[place] = (int(window.global_row_n[place]), rows[int(window.row_n[place]) - start])
        return window.first, items

    def _in_sequence(self, group_n: np.ndarray) -> list[int]:
        groups = np.unique(group_n)
        return groups[np.argsort(self._order.sequence_index(self._epoch)[groups])].tolist()

    def _group(self, group: int) -> Group:
        if self._last is None or self._last[0] != group:
            self._last = None
            layout = self._source.row_groups
            self._last = (group, self._source.load(int(layout.file[group]), int(layout.group[group])))
        return self._last[1]


class TrainingRows(IterableDataset[Share]):
    """One worker's samples from a step on: for each step a Share of each block of its streams, in order.

    In a DataLoader with several processes each makes the Shares of its own block of streams, in turn.

    Args:
        rank, world_size: which worker of how many; at most as many as there are streams.
        epoch, start_step: where to begin; what comes then is what an undisturbed run gives.
        num_classes: labels must lie in 0..num_classes - 1.

    Bad rows are left out and listed; what to do about them is TrainingLoader's.
    """

    def __init__(
        self,
        source: Source,
        order: TrainingOrder,
        augmentation: Augmentation,
        *,
        num_classes: int,
        rank: int = 0,
        world_size: int = 1,
        epoch: int = 0,
        start_step: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= start_step <= order.steps_per_epoch:
            raise ValueError(
                f"start_step ({start_step}) must lie in 0..{order.steps_per_epoch}, the steps of an epoch."
            )
        self.source, self.order, self.augmentation = source, order, augmentation
        self.num_classes, self.epoch, self.start_step = num_classes, epoch, start_step
        self.streams = order.streams(rank, world_size)

    def __iter__(self) -> Iterator[Share]:
        process = get_worker_info()
        mine, processes = (process.id, process.num_workers) if process is not None else (0, 1)
        blocks = blocks_of(self.streams, processes)
        turns = processes // len(blocks)  # processes that share this block
        augment = Augment(self.augmentation)
        executor = ThreadPoolExecutor(1, thread_name_prefix="read")
        try:
            block = blocks[mine % len(blocks)]
            readers = [StreamReader(self.source, self.order, self.epoch, stream, executor) for stream in block]
            for step in range(self.start_step + mine // len(blocks), self.order.steps_per_epoch, turns):
                yield self._share(augment, [item for reader in readers for item in reader.take(step)])
        finally:
            executor.shutdown(wait=True, cancel_futures=True)

    def _share(self, augment: Augment, rows: list[tuple[int, Row]]) -> Share:
        size = self.augmentation.size
        images = torch.empty(len(rows), 3, size, size)
        seeds = mix(self.order.seed, self.epoch, np.array([number for number, _ in rows])) >> np.uint64(1)  # 63 bits
        good, bad = [], []
        with own_randomness():
            for place, ((_, row), seed) in enumerate(zip(rows, seeds.tolist(), strict=True)):
                problem = use_row(row, self.num_classes, partial(augment.into_, images[place], seed=seed))
                if problem is None:
                    good.append(place)
                else:
                    bad.append(problem)
        labels = torch.tensor([rows[place][1].label for place in good], dtype=torch.int64)
        return Share(images[good] if bad else images, labels, tuple(bad))


def _as_it_is(share: Share) -> Share:
    return share


class TrainingLoader:
    """Iterates over (images, labels), one local batch for each step that is left in the epoch."""

    def __init__(
        self, rows: TrainingRows, *, on_bad_row: str, max_bad_rows: int, num_workers: int, pin_memory: bool
    ) -> None:
        require_policy(on_bad_row)
        self.max_bad_rows = max_bad_rows
        self.rows = rows
        self.on_bad_row = on_bad_row
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.bad_rows: list[BadRow] = []
        """Rows that were skipped so far."""

    def __len__(self) -> int:
        return self.rows.order.steps_per_epoch - self.rows.start_step

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """float32 [n, 3, size, size] and int64 [n], pinned if asked for. n may be smaller, even 0, where rows were
        skipped.

        Raises BadRowError when a row is bad and the policy is to stop, DataError when more than `max_bad_rows` are.
        """
        # A generator of its own: otherwise the DataLoader draws a number from torch's, and a run that was resumed in
        # the middle of an epoch, having made one loader more, would go on with other random numbers.
        options: dict[str, Any] = {"collate_fn": _as_it_is, "generator": torch.Generator()}
        if self.num_workers:
            options["multiprocessing_context"] = "forkserver"  # threads and CUDA do not survive a fork
        shares = iter(DataLoader(self.rows, batch_size=None, num_workers=self.num_workers, **options))
        num_parts = len(blocks_of(self.rows.streams, max(1, self.num_workers)))
        parts: list[Share] = []
        for share in shares:
            if share.bad_rows and self.on_bad_row == "stop":
                raise BadRowError.of(share.bad_rows[0])
            self.bad_rows.extend(share.bad_rows)
            if len(self.bad_rows) > self.max_bad_rows:
                raise DataError(
                    f"{len(self.bad_rows)} rows of this epoch are bad, more than data.max_bad_fraction allows; the first: "
                    f"{BadRowError.of(self.bad_rows[0])}"
                )
            parts.append(share)
            if len(parts) == num_parts:
                yield (
                    self._joined([part.images_nCHW for part in parts]),
                    self._joined([part.labels_n for part in parts]),
                )
                parts.clear()

    def _joined(self, parts: list[Tensor]) -> Tensor:
        if not self.pin_memory:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        out = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=True)
        return torch.cat(parts, out=out)


def training_loader(
    source: Source,
    order: TrainingOrder,
    augmentation: Augmentation,
    *,
    num_classes: int,
    rank: int = 0,
    world_size: int = 1,
    epoch: int = 0,
    start_step: int = 0,
    on_bad_row: str = "stop",
    max_bad_rows: int | None = None,
    num_workers: int = 0,
    pin_memory: bool | None = None,
) -> TrainingLoader:
    """This worker's local batches (images, labels) of an epoch, from a step on.

    Args:
        max_bad_rows: with on_bad_row="skip": more in this loader end the training. None: a thousandth of the source's rows.
        num_workers: loader processes; 0 decodes in this one. Changes no sample.
        pin_memory: None: when CUDA is there.
        others: of TrainingRows and TrainingOrder.
    """
    rows = TrainingRows(
        source,
        order,
        augmentation,
        num_classes=num_classes,
        rank=rank,
        world_size=world_size,
        epoch=epoch,
        start_step=start_step,
    )
    pinned = torch.cuda.is_available() if pin_memory is None else pin_memory
    limit = source.num_rows // 1000 if max_bad_rows is None else max_bad_rows
    return TrainingLoader(rows, on_bad_row=on_bad_row, max_bad_rows=limit, num_workers=num_workers, pin_memory=pinned)
