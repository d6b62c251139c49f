"""python -m benchmarks.scale: 400 million rows on 512 workers in virtual time, with the real coordinator and real commits on disk.

64 nodes of 8 workers do 1.6 million units of 250 rows, while nodes and workers die, some are only believed dead, some are twenty
times slower, commits are torn, and half-way the driver dies and reads everything back. Only the computing is made up: a unit takes an
average worker UNIT_S. docs/scaling.md says what follows from the figures.
"""

from __future__ import annotations

import heapq
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from pipeline.data.units import STRIDES
from pipeline.execution.coordinator import Abort, Coordinator, Done, Joined, Lost, Spawn, Tick, Work
from pipeline.execution.ledger import Commit, Ledger, digest
from pipeline.saliency.exact import Grid
from pipeline.saliency.statistics import GATE_KINDS

ROWS_PER_UNIT = 250
UNIT_S = 0.25
"""1,000 rows per second and worker."""
COMMIT_S = 0.5
"""What a lease takes besides its units: to begin reading, to commit, to be told of."""
START_S = 60.0
"""Until a worker that was asked for is there."""
DETECT_S = 5.0
"""Until a death is known."""
NODE_DIES_EVERY_S = 120.0
WORKER_DIES_EVERY_S = 10.0
SLOW = 20
"""Times longer that a slow worker takes for all its leases, or any worker for a slow lease."""
GRID = Grid({}, 40)  # integers are their own grid
CHANNELS = 27_840
"""Of all groups of ResNet-152."""

SPEEDS: dict[str, Callable[[random.Random], float]] = {
    "alike": lambda draw: 1.0,
    "within 30 %": lambda draw: draw.uniform(0.7, 1.3),
    "tenfold": lambda draw: 10 ** draw.uniform(-0.5, 0.5),
    "5 % slow": lambda draw: draw.uniform(0.7, 1.3) / (SLOW if draw.random() < 0.05 else 1),
}
"""A worker's speed, relative to others'."""

Message = Joined | Done | Lost


def totals(units: np.ndarray, channels: int) -> dict[str, Tensor]:
    """Sums with the names and shapes of the channel gates, in which each unit leaves a trace of its own."""
    traces = {stride: int((units[units % stride == 0] ** 2 % 1_000_003).sum()) for stride in (1, *STRIDES)}
    return {
        f"{kind}@{stride}": torch.arange(channels) * trace for kind in GATE_KINDS for stride, trace in traces.items()
    }


class Cluster:
    """A heap of what will happen in virtual time: messages on their way to the driver, and actions, which nobody sees.

    Args:
        ledger: where commits go; None keeps nothing.
        channels: size of a commit.
        troubled: whether anything goes wrong.
    """

    def __init__(
        self, num_workers: int, num_nodes: int, speeds: str, ledger: Ledger | None, channels: int, troubled: bool
    ) -> None:
        self.num_nodes, self.speed, self.ledger, self.channels = num_nodes, SPEEDS[speeds], ledger, channels
        self.troubled = troubled
        self.random = random.Random(0)
        self.now = 0.0
        self.heap: list[tuple[float, int, Message | Callable[[], None]]] = []
        self.counter = 0
        self.alive: dict[str, tuple[int, float]] = {}  # worker -> its node, and units per second
        self.driven: set[str] = set()  # workers of the present driver: it gets no others' messages
        self.happened: Counter[str] = Counter()
        self.handle_s: list[float] = []
        self.write_s = 0.0
        self.start(num_workers, START_S)
        self.units_per_s = sum(speed for _, speed in self.alive.values())
        if troubled:
            self.after(NODE_DIES_EVERY_S / 2, self.node_dies)
            self.after(WORKER_DIES_EVERY_S / 2, self.worker_dies)

    def after(self, delay_s: float, what: Message | Callable[[], None]) -> None:
        self.counter += 1
        heapq.heappush(self.heap, (self.now + delay_s, self.counter, what))

    def start(self, num_workers: int, delay_s: float) -> None:
        """A driver and its workers. Those of an earlier one die, but for some that commit what they have begun."""
        self.alive = {name: place for name, place in self.alive.items() if self.random.random() < 0.1}
        self.driven.clear()
        for _ in range(num_workers):
            self.spawn(delay_s + self.random.uniform(0, 5))

    def spawn(self, delay_s: float) -> None:
        self.counter += 1
        worker = f"w{self.counter}"
        self.driven.add(worker)
        self.alive[worker] = (self.random.randrange(self.num_nodes), self.speed(self.random) / UNIT_S)
        self.after(delay_s, Joined(worker, self.now + delay_s))

    # --- misfortune ----------------------------------------------------------------------------------------------------

    def node_dies(self) -> None:
        self.happened["nodes lost"] += 1
        lost = self.random.randrange(self.num_nodes)
        for worker in [name for name, (node, _) in self.alive.items() if node == lost]:
            self.die(worker, "node died")
        self.after(NODE_DIES_EVERY_S, self.node_dies)

    def worker_dies(self) -> None:
        worker = self.random.choice(list(self.alive))
        if self.random.random() < 0.25:
            self.happened["believed dead"] += 1
            self.after(0, Lost(worker, "unreachable", self.now))
        else:
            self.die(worker, "killed")
        self.after(WORKER_DIES_EVERY_S, self.worker_dies)

    def die(self, worker: str, cause: str) -> None:
        del self.alive[worker]
        self.happened["workers lost"] += 1
        self.after(DETECT_S, Lost(worker, cause, self.now + DETECT_S))

    # --- work ----------------------------------------------------------------------------------------------------------

    def work(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        self.happened["leases"] += 1
        self.happened["units handed out"] += len(units)
        if worker in self.alive:
            slow = SLOW if self.troubled and self.random.random() < 0.002 else 1
            self.after(COMMIT_S + slow * len(units) / self.alive[worker][1], partial(self.commit, worker, lease, units))

    def commit(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        if worker not in self.alive:
            return
        self.happened["commits"] += 1
        if self.ledger:
            commit = Commit(units, ROWS_PER_UNIT * len(units), totals(np.array(units), self.channels))
            started = time.perf_counter()
            name = self.ledger.write(commit)
            self.write_s += time.perf_counter() - started
            if self.troubled and self.random.random() < 0.002:
                self.happened["torn"] += 1
                path = Path(self.ledger.directory, name)
                os.truncate(path, path.stat().st_size - 1)
        self.after(0, Done(worker, lease, self.now))

    # --- the driver ----------------------------------------------------------------------------------------------------

    def drive(self, coordinator: Coordinator, until: int) -> None:
        """Until so many units are done."""
        while coordinator.num_done < until:
            event = self.next_event()
            started = time.process_time()
            decisions = coordinator.handle(event)
            self.handle_s.append(time.process_time() - started)
            for decision in decisions:
                match decision:
                    case Work(worker, lease, units):
                        self.work(worker, lease, units)
                    case Spawn():
                        self.spawn(START_S)
                    case Abort(cause):
                        raise AssertionError(cause)

    def next_event(self) -> Message | Tick:
        tick_at = self.now + 1
        while self.heap and self.heap[0][0] <= tick_at:
            self.now, _, what = heapq.heappop(self.heap)
            if callable(what):
                what()
            elif what.worker in self.driven:
                return what
        self.now = tick_at
        return Tick(self.now)


def undisturbed_pass(
    num_units: int, num_workers: int, num_nodes: int, speeds: str = "5 % slow", commit_interval_s: float = 30.0
) -> dict[str, Any]:
    """How long it takes, against the same work without a gap, and what it costs the coordinator."""
    cluster = Cluster(num_workers, num_nodes, speeds, ledger=None, channels=0, troubled=False)
    cluster.drive(Coordinator(np.zeros(num_units, dtype=bool), commit_interval_s), until=num_units)
    return {
        "workers": num_workers,
        "speeds": speeds,
        "commit_interval_s": commit_interval_s,
        "to_ideal": (cluster.now - START_S) * cluster.units_per_s / num_units,
        "commits": cluster.happened["commits"],
        "coordinator_us_per_event": 1e6 * sum(cluster.handle_s) / len(cluster.handle_s),
    }


def troubled_pass(directory: str, num_units: int, num_workers: int, num_nodes: int) -> dict[str, Any]:
    """Everything goes wrong, and the driver dies half-way; then the rows are counted."""
    ledger = Ledger(directory, num_units, "scale")
    cluster = Cluster(num_workers, num_nodes, "5 % slow", ledger, channels=CHANNELS // 1000, troubled=True)
    coordinator = Coordinator(np.zeros(num_units, dtype=bool), num_workers=num_workers)
    cluster.drive(coordinator, until=num_units // 2)
    restarts = {"half-way": restart(directory, num_units)}
    covered, rounds = ledger.coverage().covered, 0
    while not covered.all():  # after the first, only what was torn
        cluster.start(num_workers, delay_s=0 if rounds else START_S)
        cluster.drive(Coordinator(covered, num_workers=num_workers), until=num_units)
        covered, rounds = ledger.coverage().covered, rounds + 1
    restarts["at the end"] = restart(directory, num_units)
    started = time.perf_counter()
    reading = ledger.coverage()
    (sums,) = ledger.pieces(reading, GRID)
    read_s = time.perf_counter() - started
    undisturbed = totals(np.arange(num_units), CHANNELS // 1000)
    return {
        "virtual_s": cluster.now,
        "ideal_s": num_units / cluster.units_per_s,
        "rounds_after_the_restart": rounds,
        **cluster.happened,
        "coordinator_units_per_s": num_units / sum(cluster.handle_s),
        "coordinator_us_per_event": 1e6 * sum(cluster.handle_s) / len(cluster.handle_s),
        "coordinator_slowest_event_ms": 1e3 * max(cluster.handle_s),
        "write_ms": 1e3 * cluster.write_s / cluster.happened["commits"],
        "read_s": read_s,
        "restarts": restarts,
        "commits_left_out": len(reading.rejected),
        "rows_handed_out_again": ROWS_PER_UNIT * (cluster.happened["units handed out"] - num_units),
        "rows": reading.rows,
        "each_row_once": reading.rows == ROWS_PER_UNIT * num_units and not reading.missing,
        "sums_of_the_undisturbed_run": digest(sums.totals) == digest(undisturbed),
    }


def restart(directory: str, num_units: int) -> dict[str, float]:
    """What a driver that starts anew needs until it can hand out work, in a process of its own and with cold files."""
    files = [path for path in Path(directory).iterdir() if path.name.startswith("commit-")]
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return {"commits": len(files), **pool.submit(_restart, directory, num_units).result()}


def _restart(directory: str, num_units: int) -> dict[str, float]:
    started = time.perf_counter()
    coordinator = Coordinator(Ledger(directory, num_units, "scale").coverage().covered)
    seconds = time.perf_counter() - started
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    return {"seconds": seconds, "peak_mb": peak / 1e6, "units_done": coordinator.num_done}


def real_commits(directory: str, num_commits: int) -> dict[str, float]:
    """Commits of the size that ResNet-152's channel gates have."""
    ledger = Ledger(directory, 120 * num_commits, "scale")
    commits = [
        Commit(range(120 * i, 120 * (i + 1)), 30_000, totals(np.arange(120 * i, 120 * (i + 1)), CHANNELS))
        for i in range(num_commits)
    ]
    started = time.perf_counter()
    names = [ledger.write(commit) for commit in commits]
    written = time.perf_counter()
    header = restart(directory, 120 * num_commits)
    begun = time.perf_counter()
    reading = ledger.coverage()
    (_,) = ledger.pieces(reading, GRID)
    return {
        "commits": num_commits,
        "mb": Path(directory, names[0]).stat().st_size / 1e6,
        "write_ms": 1e3 * (written - started) / num_commits,
        "read_ms": 1e3 * (time.perf_counter() - begun) / num_commits,
        "header_ms": 1e3 * header["seconds"] / num_commits,
        "each_row_once": reading.rows == 30_000 * num_commits,
    }


def measure(num_units: int = 1_600_000, num_workers: int = 512, num_nodes: int = 64) -> dict[str, Any]:
    size = num_units, num_workers, num_nodes
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as large:
        return {
            "units": num_units,
            "workers": num_workers,
            "nodes": num_nodes,
            "undisturbed_passes": [
                *(undisturbed_pass(*size, speeds=speeds) for speeds in SPEEDS),
                *(undisturbed_pass(*size, commit_interval_s=seconds) for seconds in (60.0, 120.0)),
                undisturbed_pass(num_units, 8 * num_workers, 8 * num_nodes),
            ],
            "troubled_pass": troubled_pass(small, *size),
            "real_commits": real_commits(large, num_commits=100),
        }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(tyro.cli(measure), indent=1))
