"""A cluster in virtual time that drives the real coordinator and the real rule of acceptance through seeded misfortune.

One seed is one story: workers and whole nodes that die, before, in and after a commit; messages that are late, overtake each other,
come twice or never; stragglers that commit together with those who copied them; commits that are torn, doubled, or never reach the
storage; workers believed dead that commit all the same, even when another driver has long taken over; workers that join late or
leave; a driver that dies at any moment. Whatever happens, each row counts once, and the sums have the bits of the undisturbed run.
`python -m tests.simulation --seeds 100000` looks for a seed that breaks this.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from pipeline.execution.coordinator import Abort, Coordinator, Done, Joined, Lost, Spawn, Tick, Work
from pipeline.execution.ledger import Commit, Reading, accept, digest, pieces
from pipeline.saliency.exact import Grid

GRID = Grid({}, 52)  # integers are their own grid
ROWS_PER_UNIT = 3

Message = Joined | Done | Lost


def totals(units: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {"a": torch.tensor([sum(1_000_003 * unit**2 + 17 for unit in units)])}


@dataclass
class Storage:
    """Commits by name. A torn one is there, but no reader takes it."""

    commits: dict[str, Commit] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)

    def put(self, units: tuple[int, ...], tag: int, torn: bool) -> None:
        name = f"commit-{min(units):09d}-{tag:012x}"
        self.commits[name] = Commit(units, ROWS_PER_UNIT * len(units), totals(units if not torn else (0,)), name=name)
        if torn:
            self.torn.add(name)

    def read(self, num_units: int) -> Reading:
        return accept((c for name, c in sorted(self.commits.items()) if name not in self.torn), num_units)


class Cluster:
    """A heap of what will happen: messages on their way to the driver, and actions, which nobody sees."""

    FATES = ("dies", "raises", "commits and dies", "leaves", "unreachable", "silent", "torn", "never stored", "doubled")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.num_units = self.random.randint(1, 60)
        self.num_workers = self.random.randint(1, 6)
        self.trouble = self.random.choice([0.0, 0.05, 0.2, 0.4])
        self.troubles_left = 30
        self.storage = Storage()
        self.happened: Counter[str] = Counter()
        self.now = 0.0
        self.heap: list[tuple[float, int, Message | Callable[[], None]]] = []
        self.counter = 0
        self.node_of: dict[str, int] = {}  # of workers that live
        self.pace_s: dict[str, float] = {}  # seconds per unit
        self.driven: set[str] = set()  # workers of the present driver: it gets no others' messages

    def misfortune(self, name: str) -> bool:
        if self.troubles_left and self.random.random() < self.trouble:
            self.troubles_left -= 1
            self.happened[name] += 1
            return True
        return False

    # --- what happens by itself ----------------------------------------------------------------------------------------

    def after(self, delay_s: float, what: Message | Callable[[], None]) -> None:
        self.counter += 1
        heapq.heappush(self.heap, (self.now + delay_s, self.counter, what))

    def tell(self, kind: type[Message], *details: str | int) -> None:
        """A message to the driver, which dates it when it comes."""
        for _ in range(2 if self.misfortune("message twice") else 1):
            delay_s = self.random.expovariate(2.0)
            self.after(delay_s, kind(*details, now=self.now + delay_s))

    def spawn(self) -> None:
        self.counter += 1
        worker = f"w{self.counter}"
        self.driven.add(worker)
        self.node_of[worker] = self.random.randrange(3)
        self.pace_s[worker] = self.random.uniform(0.2, 2)
        self.after(self.random.uniform(0, 5), partial(self.tell, Joined, worker))

    def die(self, worker: str, cause: str) -> None:
        if self.node_of.pop(worker, None) is not None:
            self.tell(Lost, worker, cause)

    def node_dies(self) -> None:
        node = self.random.randrange(3)
        for worker in [name for name, place in self.node_of.items() if place == node]:
            self.die(worker, "node died")

    # --- a worker and its lease ----------------------------------------------------------------------------------------

    def work(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        duration_s = len(units) * self.pace_s[worker] * self.random.uniform(0.8, 1.2)
        if self.random.random() < 0.1:
            duration_s *= self.random.uniform(2, 20)
        fate = self.random.choice(self.FATES)
        fate = fate if self.misfortune(fate) else ""
        if fate == "dies":
            self.after(duration_s * self.random.random(), partial(self.die, worker, "killed"))
        if fate == "unreachable":  # believed dead, and commits later
            self.after(duration_s * self.random.random(), partial(self.tell, Lost, worker, "unreachable"))
        self.after(duration_s, partial(self.commit, worker, lease, units, fate))

    def commit(self, worker: str, lease: int, units: tuple[int, ...], fate: str) -> None:
        if worker not in self.node_of:
            return
        if fate == "raises":
            return self.die(worker, "CUDA error")
        for _ in range(2 if fate == "doubled" else 1):
            if fate != "never stored":
                self.storage.put(units, self.random.getrandbits(48), torn=fate == "torn")
        if fate == "commits and dies":
            return self.die(worker, "killed")
        if fate == "silent":  # its message is lost
            return self.after(self.random.uniform(10, 100), partial(self.die, worker, "no heartbeat"))
        self.tell(Done, worker, lease)
        if fate == "leaves":
            self.die(worker, "preempted")

    # --- the driver ----------------------------------------------------------------------------------------------------

    def drive(self, coordinator: Coordinator) -> None:
        """Until finished, or until the driver itself dies."""
        dies_at = (
            self.now + self.random.choice([0, 60]) * self.random.random() if self.misfortune("driver dies") else None
        )
        self.driven.clear()
        for _ in range(self.num_workers):
            self.spawn()
        if self.misfortune("joins late"):
            self.after(self.random.uniform(0, 60), self.spawn)
        if self.misfortune("node dies"):
            self.after(self.random.uniform(0, 60), self.node_dies)
        while not coordinator.finished:
            assert self.now < 100_000, f"still {coordinator.num_done} of {self.num_units} units after {self.now:.0f} s"
            event = self.next_event()
            if dies_at is not None and self.now >= dies_at:
                break
            for decision in coordinator.handle(event):
                match decision:
                    case Work(worker, lease, units):
                        self.work(worker, lease, units)
                    case Spawn():
                        self.spawn()
                    case Abort(cause):
                        raise AssertionError(f"aborted: {cause}")
        for worker in list(self.node_of):  # most workers die with their driver, others finish what they have begun
            if self.random.random() < 0.7:
                del self.node_of[worker]

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

    def settle(self) -> None:
        """Whatever is still on its way comes to its end."""
        self.driven.clear()
        while self.heap:
            self.next_event()


def run(seed: int) -> Counter[str]:
    """One story, and what happened in it. Raises AssertionError with the seed when a row counts twice or not at all."""
    try:
        return _run(Cluster(seed))
    except AssertionError as error:
        raise AssertionError(f"seed {seed}: {error}") from error


def _run(cluster: Cluster) -> Counter[str]:
    settled = False
    while True:
        reading = cluster.storage.read(cluster.num_units)
        if not reading.missing:
            _require_undisturbed(reading, cluster.num_units)
            if settled:
                break
            cluster.settle()  # a later reader finds what came after the end
            settled = True
            continue
        cluster.happened["drivers"] += 1
        assert cluster.happened["drivers"] < 100, f"units {reading.missing} never counted"
        cluster.drive(Coordinator(reading.covered, commit_interval_s=8.0, max_failures=40))
    happened = cluster.happened
    happened["left out"] += len(reading.rejected)
    if not happened["torn"] + happened["never stored"] + happened["driver dies"]:
        assert happened["drivers"] == 1, "the coordinator believed in commits that the reader left out"
    return happened


def _require_undisturbed(reading: Reading, num_units: int) -> None:
    assert reading.rows == ROWS_PER_UNIT * num_units, f"{reading.rows} rows of {ROWS_PER_UNIT * num_units}"
    (sums,) = pieces(reading.accepted, GRID)
    assert digest(sums.totals) == digest(totals(tuple(range(num_units)))), "other bits"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    happened: Counter[str] = Counter()
    for number in range(arguments.first, arguments.first + arguments.seeds):
        happened += run(number)
    print(f"{arguments.seeds} stories from seed {arguments.first}: each row counted once.")
    print(", ".join(f"{name} {count}" for name, count in happened.most_common()))
