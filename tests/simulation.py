"""A cluster in virtual time that drives the real coordinator and the real rule of acceptance through seeded misfortune.

One seed is one story: deaths in the middle of a lease, before and after its commit, messages that come twice, late or never,
stragglers, torn and doubled commits, workers that were believed dead and commit all the same, a driver that starts anew. Whatever
happens, each unit must count once. `python -m tests.simulation --seeds 100000` looks for a seed that breaks this.
"""

from __future__ import annotations

import argparse
import heapq
import random
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.execution.coordinator import Abort, Coordinator, Done, Event, Joined, Lost, Spawn, Tick, Work
from pipeline.execution.ledger import Commit, Reading, accept
from pipeline.saliency.exact import ExactSums, Grid

GRID = Grid({"a": 0}, 52)


def addend(unit: int) -> int:
    return 1_000_003 * unit**2 + 17


@dataclass
class Storage:
    """Commits by name. A torn one is there, but no reader takes it."""

    commits: dict[str, Commit] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)

    def put(self, units: tuple[int, ...], name: str) -> None:
        totals = {"a": torch.tensor([sum(addend(u) for u in units)])}
        self.commits[name] = Commit(units, len(units), totals, name=name)

    def read(self, num_units: int) -> Reading:
        return accept((c for name, c in sorted(self.commits.items()) if name not in self.torn), num_units, GRID)


class Cluster:
    """Virtual time: a heap of (time, tie, event or action)."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_units = self.random.randint(1, 40)
        self.num_workers = self.random.randint(1, 5)
        self.trouble = self.random.choice([0.0, 0.05, 0.2, 0.4])
        self.storage = Storage()
        self.heap: list[tuple[float, int, Event]] = []
        self.now = 0.0
        self.counter = 0
        self.deaths_left = 30

    def send(self, delay: float, event: Event) -> None:
        self.counter += 1
        heapq.heappush(self.heap, (self.now + delay, self.counter, event))

    def misfortune(self) -> bool:
        if self.deaths_left and self.random.random() < self.trouble:
            self.deaths_left -= 1
            return True
        return False

    def spawn(self) -> None:
        self.counter += 1
        worker = f"w{self.counter}"
        at = self.now + self.random.uniform(0, 5)
        self.send(at - self.now, Joined(worker, at))

    def work(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        """A worker's fate with its lease."""
        duration = len(units) * self.random.uniform(0.5, 2) * (20 if self.random.random() < 0.05 else 1)
        name = f"commit-{min(units):09d}-{self.random.getrandbits(48):012x}"
        end = self.now + duration
        fate = self.random.choice(["dies", "raises", "commits and dies", "torn", "doubled", "repeats itself", "zombie"])
        if not self.misfortune():
            self.storage.put(units, name)
            self.send(duration, Done(worker, lease, end))
        elif fate == "dies":
            self.send(duration / 2, Lost(worker, "killed", end))
        elif fate == "raises":
            self.send(duration, Lost(worker, "CUDA error", end))
        elif fate == "commits and dies":
            self.storage.put(units, name)
            self.send(duration, Lost(worker, "killed after its commit", end))
        elif fate == "torn":
            self.storage.put(units, name)
            self.storage.torn.add(name)
            self.send(duration, Done(worker, lease, end))
        elif fate == "doubled":
            self.storage.put(units, name)
            self.storage.put(units, name + "-again")
            self.send(duration, Done(worker, lease, end))
        elif fate == "repeats itself":
            self.storage.put(units, name)
            self.send(duration, Done(worker, lease, end))
            self.send(duration + self.random.uniform(0, 30), Done(worker, lease, end))
        else:  # believed dead now, commits later
            self.send(duration / 4, Lost(worker, "unreachable", end))
            self.send(duration, Done(worker, lease, end))
            self.storage.put(units, name)

    def drive(self, coordinator: Coordinator) -> str | None:
        """Until finished, or until the driver itself dies. Returns the cause of an abort."""
        for _ in range(self.num_workers):
            self.spawn()
        driver_dies_at = self.now + self.random.uniform(0, 60) if self.misfortune() else float("inf")
        while not coordinator.finished:
            if not self.heap:
                self.send(1.0, Tick(self.now + 1.0))
            self.now, _, event = heapq.heappop(self.heap)
            if self.now > driver_dies_at:
                self.heap.clear()
                return None
            for decision in coordinator.handle(event):
                if isinstance(decision, Work):
                    self.work(decision.worker, decision.lease, decision.units)
                elif isinstance(decision, Spawn):
                    self.spawn()
                elif isinstance(decision, Abort):
                    return decision.cause
        self.heap.clear()
        return None


def run(seed: int) -> Reading:
    """One story. Raises AssertionError with the seed when a unit counts twice or not at all."""
    cluster = Cluster(seed)
    reading = cluster.storage.read(cluster.num_units)
    for _ in range(200):
        if not reading.missing:
            break
        coordinator = Coordinator(reading.covered, commit_interval_s=5.0, max_failures=40)
        cause = cluster.drive(coordinator)
        assert cause is None, f"seed {seed}: aborted: {cause}"
        reading = cluster.storage.read(cluster.num_units)
    undisturbed = ExactSums(GRID)
    for unit in range(cluster.num_units):
        undisturbed.add_quantised("a", torch.tensor([addend(unit)]))
    assert reading.missing == [], f"seed {seed}: units {reading.missing} never counted"
    assert reading.rows == cluster.num_units, f"seed {seed}: {reading.rows} rows of {cluster.num_units}"
    assert reading.sums is not None
    assert torch.equal(reading.sums.totals["a"], undisturbed.totals["a"]), f"seed {seed}: other bits"
    assert isinstance(reading.covered, np.ndarray)
    return reading


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    rejected = 0
    for number in range(arguments.first, arguments.first + arguments.seeds):
        rejected += len(run(number).rejected)
    print(
        f"{arguments.seeds} stories from seed {arguments.first}: each unit counted once; {rejected} commits left out by the rule"
    )
