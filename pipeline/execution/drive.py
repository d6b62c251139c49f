"""One pass over the data: the coordinator decides, a pool acts, the ledger keeps. The same loop for one process and for a cluster."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.execution.coordinator import (
    Abort,
    Coordinator,
    Done,
    Event,
    Finish,
    Joined,
    Lost,
    Spawn,
    Tick,
    Work,
)
from pipeline.execution.ledger import Digest, Ledger, Reading, TornCommit, shapes_of
from pipeline.execution.worker import Pass, UnitWorker
from pipeline.saliency.exact import ExactSums, Grid, Magnitudes


class PassFailed(RuntimeError):
    """A pass over the data cannot go on; what is committed stays."""


class Pool(Protocol):
    """Workers that run leases."""

    def start(self, work: Pass) -> None:
        """Send a pass to every worker."""

    def pilot(self) -> tuple[Magnitudes, str]:
        """Magnitudes of the sums of the first unit, from any worker, and the kind of its device."""

    def fix_grid(self, grid: Grid) -> None: ...

    def assign(self, worker: str, lease: int, units: tuple[int, ...]) -> None: ...

    def spawn(self) -> None:
        """Start one more worker; it announces itself with Joined."""

    def events(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; waits at most `timeout_s`."""

    def finish(self) -> None:
        """End a pass: leases that still run are of no use any more."""

    @property
    def num_workers(self) -> int: ...


@dataclass
class PassResult:
    """What a pass over the data adds up to."""

    values: dict[str, Tensor]
    """float64, and int64 for counts; empty if they were written to a file."""
    sha256: str
    """Over the exact integer sums: equal for any number of workers, any order, any failures."""
    rows: int
    units: int
    workers: int
    seconds: float
    bad_rows: list[dict[str, Any]] = field(default_factory=list)
    lost_workers: int = 0
    commits: int = 0
    rejected_commits: list[str] = field(default_factory=list)
    resumed_units: int = 0
    stride: int = 1
    """Every `stride`-th unit was taken."""


def run_pass(
    work: Pass,
    pool: Pool,
    *,
    commit_interval_s: float = 30.0,
    max_failures: int = 3,
    max_bad_fraction: float = 0.001,
    stride: int = 1,
    into: str | None = None,
    on_progress: Callable[[int], None] = lambda rows: None,
    on_lease: Callable[[int, float], None] = lambda units, seconds: None,
    on_warning: Callable[[str], None] = lambda text: None,
) -> PassResult:
    """Run every unit of `work` exactly once and return the exact sums; with a `stride` of data.units.STRIDES every `stride`-th unit.

    Goes on from the commits that the ledger holds. `on_progress` is told the rows that are done, `on_lease` the units of a
    committed lease and the seconds that its worker took, `on_warning` what went wrong and was mended. With `into` the sums go to that
    safetensors file, piece by piece, and are never all in memory. Raises PassFailed when the pass cannot be completed.
    """
    started = time.monotonic()
    wanted = np.zeros(len(work.units), dtype=bool)
    wanted[::stride] = True
    grid = work.ledger.grid()
    reading = work.ledger.coverage()
    if grid is None and reading.commits:
        raise PassFailed(
            f"{work.ledger.directory} has commits, but no grid.json to read them by. Remove the directory."
        )
    resumed, num_lost, totals = int(reading.covered.sum()), 0, None
    while totals is None:
        if (wanted & ~reading.covered).any():
            for reason in reading.rejected:
                on_warning(f"left out {reason}")
            grid = _begin(work, pool, grid)
            work = replace(work, grid=grid)
            coordinator = Coordinator(
                reading.covered | ~wanted,
                commit_interval_s=commit_interval_s,
                max_failures=max_failures,
                num_workers=pool.num_workers,
            )
            left_out = int((~wanted & ~reading.covered).sum())
            most_bad = max_bad_fraction * work.units.num_rows / stride
            num_bad = len(reading.bad_rows)
            _drive(coordinator, pool, work, num_bad, left_out, most_bad, on_progress, on_lease, on_warning)
            pool.finish()
            num_lost += coordinator.num_lost
            num_files, reading = reading.num_files, work.ledger.coverage()
            if reading.num_files == num_files:
                raise PassFailed(
                    f"workers say they have committed all units to {work.ledger.directory}, but nothing new is there. Is --run-dir on "
                    "storage that all nodes share?"
                )
            continue
        try:  # all there by their headers; what turns out broken is done again
            assert grid is not None
            totals = _add_up(work.ledger, reading, grid, stride, into)
        except TornCommit:
            reading = work.ledger.coverage()
    _require_few_bad_rows(reading, max_bad_fraction * work.units.num_rows / stride)
    return PassResult(
        values=totals.values,
        sha256=totals.sha256,
        rows=reading.rows if totals.rows is None else totals.rows,
        units=int(wanted.sum()),
        workers=pool.num_workers,
        seconds=time.monotonic() - started,
        bad_rows=reading.bad_rows,
        lost_workers=num_lost,
        commits=reading.commits,
        rejected_commits=reading.rejected,
        resumed_units=resumed,
        stride=stride,
    )


@dataclass(frozen=True)
class _Totals:
    values: dict[str, Tensor]
    sha256: str
    rows: int | None
    """Of a sample; the ledger may hold a part of a larger one, which an earlier start has begun."""


def _add_up(ledger: Ledger, reading: Reading, grid: Grid, stride: int, into: str | None) -> _Totals:
    """Raises TornCommit."""
    identity, counted = Digest(), {}

    def pieces() -> Iterator[dict[str, Tensor]]:
        for sums in ledger.pieces(reading, grid):
            chosen = sums if stride == 1 else sums.sample(stride)
            identity.update(chosen.totals)
            counted.update({name: int(total) for name, total in chosen.totals.items() if name == "rows"})
            yield chosen.values()

    values = {}
    if into is None:
        values = {name: value for piece in pieces() for name, value in piece.items()}
    else:
        shapes = {
            name: torch.zeros(shape, dtype=torch.int64, device="meta")
            for name, shape in shapes_of(reading.accepted).items()
        }
        whole = ExactSums(grid, shapes)
        about = (whole if stride == 1 else whole.sample(stride)).values()
        artifacts.write_parts(
            into, artifacts.streamed_tensors(about, (item for piece in pieces() for item in piece.items()))
        )
    return _Totals(values, identity.hex(), None if stride == 1 else counted["rows"])


def _begin(work: Pass, pool: Pool, grid: Grid | None) -> Grid:
    """Send the pass to the workers; the first of them works out the pilot unless an earlier start did."""
    pool.start(work)
    if grid is None:
        pilot, processor = pool.pilot()
        grid = Grid.from_pilot(pilot, num_addends=len(work.units), segments=work.task.segments)
        work.ledger.fix_grid(grid, processor)
    pool.fix_grid(grid)
    return grid


def _drive(
    coordinator: Coordinator,
    pool: Pool,
    work: Pass,
    num_bad: int,
    left_out: int,
    most_bad: float,
    on_progress: Callable[[int], None],
    on_lease: Callable[[int, float], None],
    on_warning: Callable[[str], None],
) -> None:
    """Carry events to the coordinator and its decisions to the pool until it says it is finished, or too many rows are bad."""
    given: dict[tuple[str, int], tuple[int, float]] = {}  # (worker, lease) -> units, and when
    while not coordinator.finished:
        for event in pool.events(timeout_s=1.0):
            if isinstance(event, Lost):
                on_warning(f"worker {event.worker}: {event.cause}")
            if isinstance(event, Done) and (event.worker, event.lease) in given:
                num_units, since = given.pop((event.worker, event.lease))
                on_lease(num_units, event.now - since)
            if isinstance(event, Done) and event.bad_rows:
                num_bad += event.bad_rows
                if num_bad > most_bad:  # by this count; what the ledger accepts decides
                    _require_few_bad_rows(work.ledger.coverage(), most_bad)
            for decision in coordinator.handle(event):
                match decision:
                    case Work(worker, lease, units):
                        given[worker, lease] = (len(units), event.now)
                        pool.assign(worker, lease, units)
                    case Spawn():
                        pool.spawn()
                    case Abort(cause):
                        raise PassFailed(cause)
                    case Finish():
                        break
        on_progress(min((coordinator.num_done - left_out) * work.units.rows_per_unit, work.units.num_rows))


def _require_few_bad_rows(reading: Reading, most_bad: float) -> None:
    if len(reading.bad_rows) > most_bad:
        first = reading.bad_rows[0]
        raise PassFailed(
            f"{len(reading.bad_rows)} rows are bad, more than the {int(most_bad)} that data.max_bad_fraction allows; the first: {first}. "
            "Repair the data, or raise data.max_bad_fraction."
        )


class LocalPool:
    """One worker in this process: the library without Ray, and the reference that a cluster must equal."""

    def __init__(self, device: torch.device | None = None, threads: int = 1) -> None:
        self._worker = UnitWorker(device or torch.device("cpu"), threads)
        self._lease: tuple[int, tuple[int, ...]] | None = None
        self._greeted = False

    num_workers = 1

    def start(self, work: Pass) -> None:
        # A copy, as workers elsewhere get one: placing a network changes it.
        self._worker.load(replace(work, task=copy.deepcopy(work.task)))
        self._greeted = False

    def pilot(self) -> tuple[Magnitudes, str]:
        return self._worker.pilot()

    def fix_grid(self, grid: Grid) -> None:
        self._worker.fix_grid(grid)

    def assign(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        self._lease = (lease, units)

    def spawn(self) -> None:
        self._greeted = False

    def events(self, timeout_s: float) -> list[Event]:
        now = time.monotonic()
        if not self._greeted:
            self._greeted = True
            return [Joined("local", now)]
        if self._lease is None:
            return [Tick(now)]
        (lease, units), self._lease = self._lease, None
        commit = self._worker.work(units)  # an error is the caller's own: it surfaces as it is
        return [Done("local", lease, time.monotonic(), len(commit.bad_rows))]

    def finish(self) -> None:
        self._lease = None
