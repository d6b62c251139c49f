"""What one worker does with a lease: read, decode, compute, sum, commit. Knows no other process.

Between two leases a worker remembers nothing that counts: when it dies, exactly its uncommitted lease is lost.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from queue import Queue
from typing import Any, TypeVar

import torch
from torch import Tensor

from pipeline.data.batches import Batch, Decoder, unit_batches
from pipeline.data.rows import Source
from pipeline.data.units import STRIDES, Units
from pipeline.execution.ledger import Commit, Ledger
from pipeline.models.task import CHECKED_ROWS, Task, add_
from pipeline.saliency.exact import ExactSums, Grid, Magnitudes, SumOverflow, magnitudes

T = TypeVar("T")
MEMORY_FORMAT = torch.channels_last
"""Faster on GPUs, and on CPUs above all where convolutions are depthwise."""


@dataclass(frozen=True)
class Pass:
    """One pass over units: everything a worker needs to know."""

    task: Task
    source: Source
    units: Units
    decoder: Decoder
    ledger: Ledger
    grid: Grid | None
    micro_batch: int
    num_classes: int
    on_bad_row: str
    decode_threads: int = 1


def make_deterministic(device: torch.device, threads: int) -> None:
    """The same bits on every worker of one device kind: fixed threads, deterministic kernels, no TF32 surprises."""
    torch.set_num_threads(threads)
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def processor(device: torch.device) -> str:
    """What the bits of a floating-point sum depend on: the GPU's or the CPU's model, its instruction set and threads, torch's version."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{cpu_model()} {capability}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def cpu_model() -> str:
    """Libraries choose their kernels, and so their rounding, by the maker and the caches of a CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


class UnitWorker:
    """Computes units of one pass at a time."""

    def __init__(self, device: torch.device, threads: int) -> None:
        self.device = device
        make_deterministic(device, threads)
        self._pass: Pass | None = None
        self._admitted = self._checked = False

    def load(self, work: Pass) -> None:
        self._admitted = self._checked = False
        self._pass = None  # what it holds on the device goes before the new networks come
        self._place(work.task)
        self._pass = work

    def _place(self, task: Task) -> None:
        task.to(self.device, MEMORY_FORMAT)

    def fix_grid(self, grid: Grid) -> None:
        assert self._pass is not None
        self._pass = replace(self._pass, grid=grid)

    def pilot(self) -> tuple[Magnitudes, str]:
        """Magnitudes of the sums of the first unit that has any row, and the kind of this device."""
        assert self._pass is not None
        for unit in range(len(self._pass.units)):
            sums, rows, _ = self._unit(self._batches([unit]))
            if rows:
                return self._magnitudes(sums), processor(self.device)
        raise ValueError(
            "no unit has a single readable row. Look at the report's bad rows, or set data.on_bad_row=stop to see the first."
        )

    def _magnitudes(self, sums: dict[str, Tensor]) -> Magnitudes:
        assert self._pass is not None
        return magnitudes(sums, self._pass.task.segments)

    def work(self, units: Sequence[int]) -> Commit:
        """Compute and commit a lease."""
        assert self._pass is not None
        assert self._pass.grid is not None
        if not self._admitted:
            self._pass.ledger.require_same_place(processor(self.device))
            self._admitted = True
        total = ExactSums(self._pass.grid)
        num_rows, bad_rows = 0, []
        batches = prefetch(self._batches(units), depth=2)
        try:
            for unit in units:
                sums, rows, bad = self._unit(batches)
                strides = [stride for stride in STRIDES if unit % stride == 0]
                try:
                    total.add(sums, strides, self._pass.task.nested)
                except SumOverflow as error:
                    raise SumOverflow(f"{self._where(unit)}: {error}") from error
                num_rows += rows
                bad_rows += bad
        finally:
            batches.close()
        return self._commit(tuple(units), num_rows, total.totals, tuple(bad_rows))

    def _commit(
        self, units: tuple[int, ...], rows: int, totals: dict[str, Tensor], bad_rows: tuple[dict[str, Any], ...]
    ) -> Commit:
        assert self._pass is not None
        commit = Commit(units, rows, totals, bad_rows)
        self._pass.ledger.write(commit)
        return commit

    def _where(self, index: int) -> str:
        assert self._pass is not None
        unit = self._pass.units[index]
        return f"unit {index} (file {unit.file}, row group {unit.row_group}, rows {unit.start} to {unit.stop - 1})"

    def _batches(self, units: Sequence[int], share: tuple[int, int] = (0, 1)) -> Iterator[Batch | None]:
        """The micro-batches of the units in order, in pinned memory for a GPU, or every n-th of each; None closes a unit."""
        work = self._pass
        assert work is not None
        for index in units:
            for batch in unit_batches(
                work.source,
                work.units[index],
                work.decoder,
                micro_batch=work.micro_batch,
                num_classes=work.num_classes,
                on_bad_row=work.on_bad_row,
                threads=work.decode_threads,
                share=share,
            ):
                yield batch.pinned() if self.device.type == "cuda" else batch
            yield None

    def _unit(self, batches: Iterator[Batch | None]) -> tuple[dict[str, Tensor], int, list[dict[str, Any]]]:
        """Sum the micro-batches of one unit, in order, on the device."""
        assert self._pass is not None
        task, sums = self._pass.task, dict[str, Tensor]()
        rows, bad_rows = 0, []
        for batch in batches:
            if batch is None:
                break
            bad_rows += [asdict(row) for row in batch.bad_rows]
            if len(batch.labels_N) == 0:
                continue
            rows += len(batch.labels_N)
            images, labels = self._on_device(batch)
            if not self._checked and len(labels) > 1:
                task.check(images[:CHECKED_ROWS], labels[:CHECKED_ROWS])
                self._checked = True
            add_(sums, task(images, labels))
        return sums | task.collect(), rows, bad_rows

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images = batch.images_NCHW.to(self.device, non_blocking=True, memory_format=MEMORY_FORMAT)
        return images, batch.labels_N.to(self.device, non_blocking=True)


def prefetch(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The same items, made by a background thread that runs at most `depth` ahead. Its exceptions come out here."""
    queue: Queue[tuple[str, Any]] = Queue(maxsize=depth)
    stopped = threading.Event()

    def produce() -> None:
        try:
            for item in items:
                queue.put(("item", item))
                if stopped.is_set():
                    return
            queue.put(("end", None))
        except BaseException as error:
            queue.put(("error", error))

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = queue.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        while thread.is_alive():
            while not queue.empty():
                queue.get_nowait()
            thread.join(timeout=0.01)
