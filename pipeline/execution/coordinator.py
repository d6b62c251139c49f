"""Who does which unit: a pure state machine. Events in, decisions out; no clock, no files, no ray.

A lease is a set of units that one worker computes and commits as one object: as many as it does in a commit interval at its own
speed, fewer towards the end, so that fast and slow workers end together.

A lease that is lost goes back to the queue in a few pieces, and a piece that is lost again in smaller ones: a unit that kills its
worker is soon alone, and only then counts the death as its own, while units that were on a dying node are done again at little cost.
Before another try there is a pause, which grows for a unit that fails alone, so that a short outage of the storage passes by itself.
A worker that fails is replaced, whatever the error: a broken GPU must not get the next lease.

When the queue is empty, idle workers copy the leases that are overdue, piece by piece. Of commits that share a unit the ledger takes
one, whole, and the smallest unit of a commit decides its turn. Therefore
- a lease never mixes units of two others: of an old lease and its pieces, one or all of the pieces count, and no unit falls out;
- the piece with the first unit is copied last, once the others are committed: until then it is the original that counts if it comes.
This only saves time. What counts is read from the ledger, and units that nobody has there are done again.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

PIECES = 8
"""Of a lost lease, and of one that is copied."""
FIRST_PAUSE_S = 1.0
"""Before what was lost is tried again; four times as long after each further failure of a unit alone."""

# --- events: what happened ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A worker is ready for its first lease. Its name was never used before."""

    worker: str
    now: float


@dataclass(frozen=True)
class Done:
    """A worker has committed a lease."""

    worker: str
    lease: int
    now: float
    bad_rows: int = 0
    """Rows of the lease that were left out."""


@dataclass(frozen=True)
class Lost:
    """A worker died, cannot be reached, or raised an error that might not come again elsewhere; it is gone."""

    worker: str
    cause: str
    now: float
    replace: bool = True
    """Whether another one is wanted in its place."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""

    now: float


Event = Joined | Done | Lost | Tick

# --- decisions: what to do ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    worker: str
    lease: int
    """Names the lease in its outcome: a message that comes twice or late is known by it."""
    units: tuple[int, ...]


@dataclass(frozen=True)
class Spawn:
    """Start a worker in place of one that was lost."""

    reason: str


@dataclass(frozen=True)
class Abort:
    cause: str


@dataclass(frozen=True)
class Finish:
    """Every unit is committed."""


Decision = Work | Spawn | Abort | Finish


@dataclass
class _Lease:
    id: int
    units: tuple[int, ...]
    """Ascending."""
    since: float
    uncopied: int
    """How many of them, from the first, were given to nobody else."""

    @property
    def piece_size(self) -> int:
        return -(-len(self.units) // PIECES)


@dataclass
class Coordinator:
    """Args:
    covered: bool [num_units], units that count already.
    commit_interval_s: how long a lease should take.
    max_failures: deaths that one unit may cause alone, and that each place for a worker may see without any commit between them.
    straggler_factor: a lease that takes this many times its due is copied, once the queue is empty.
    num_workers: places that are being filled at the start. A whole node may fail before the first worker is ready.
    """

    covered: np.ndarray
    commit_interval_s: float = 30.0
    max_failures: int = 3
    straggler_factor: float = 2.0
    num_workers: int = 1

    finished: bool = field(default=False, init=False)
    num_lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.covered = self.covered.copy()
        self._fresh = np.flatnonzero(~self.covered)
        self._cursor = 0
        self._returned: list[tuple[float, tuple[int, ...]]] = []  # a heap of (not before, units)
        self._queued = self._remaining = len(self._fresh)
        self._leases: dict[str, _Lease] = {}
        self._idle: dict[str, None] = {}  # insertion order: the longest idle first
        self._gone: set[str] = set()
        self._units_per_s: dict[str, float] = {}  # of each worker, in its last lease
        self._last_size: dict[str, int] = {}  # and how many units that was
        self._failures: Counter[int] = Counter()
        self._failures_in_a_row = 0
        self._most_workers = self.num_workers  # at once, since the last commit
        self._num_leases = 0

    @property
    def num_done(self) -> int:
        return len(self.covered) - self._remaining

    def handle(self, event: Event) -> list[Decision]:
        if self.finished:
            return []
        match event:
            case Joined(worker, now):
                if worker in self._leases or worker in self._gone:
                    return []
                self._idle[worker] = None
                self._most_workers = max(self._most_workers, self._num_present)
            case Done(worker, lease, now):
                if not self._holds(worker, lease):
                    return []
                self._commit(worker, now)
                self._idle[worker] = None
            case Lost(worker, cause, now, replace):
                if worker in self._gone:
                    return []
                if abort := self._take_back(worker, cause, now):
                    return abort
                return [*([Spawn(cause)] if replace else []), *self._assign(now)]
            case Tick(now):
                pass  # a pause may be over, a lease overdue
        if self._remaining == 0:
            self.finished = True
            return [Finish()]
        return self._assign(now)

    # --- bookkeeping ---------------------------------------------------------------------------------------------------

    @property
    def _num_present(self) -> int:
        return len(self._leases) + len(self._idle)

    def _holds(self, worker: str, lease: int) -> bool:
        return worker in self._leases and self._leases[worker].id == lease

    def _uncovered(self, units: tuple[int, ...]) -> tuple[int, ...]:
        ids = np.array(units, dtype=np.int64)
        return tuple(ids[~self.covered[ids]].tolist())

    def _commit(self, worker: str, now: float) -> None:
        lease = self._leases.pop(worker)
        self._units_per_s[worker] = len(lease.units) / max(now - lease.since, 1e-6)
        self._last_size[worker] = len(lease.units)
        self._failures_in_a_row = 0
        self._most_workers = self._num_present + 1
        ids = np.array(lease.units)
        self._remaining -= int((~self.covered[ids]).sum())
        self.covered[ids] = True

    def _take_back(self, worker: str, cause: str, now: float) -> list[Decision]:
        self.num_lost += 1
        self._failures_in_a_row += 1
        self._gone.add(worker)
        self._idle.pop(worker, None)
        self._units_per_s.pop(worker, None)
        if lease := self._leases.pop(worker, None):
            pause_s = FIRST_PAUSE_S
            if len(lease.units) == 1:
                (unit,) = lease.units
                self._failures[unit] += 1
                if self._failures[unit] > self.max_failures:
                    return self._abort(f"unit {unit} failed {self._failures[unit]} times, last: {cause}")
                pause_s *= 4.0 ** (self._failures[unit] - 1)
            own = self._uncovered(lease.units[: lease.uncopied])
            for start in range(0, len(own), lease.piece_size):
                self._put_back(now + pause_s, own[start : start + lease.piece_size])
        if self._failures_in_a_row > self.max_failures * self._most_workers:
            return self._abort(f"{self._failures_in_a_row} failures without one commit, last: {cause}")
        return []

    def _put_back(self, not_before: float, units: tuple[int, ...]) -> None:
        if units:
            heapq.heappush(self._returned, (not_before, units))
            self._queued += len(units)

    def _abort(self, cause: str) -> list[Decision]:
        self.finished = True
        return [Abort(cause)]

    # --- leases --------------------------------------------------------------------------------------------------------

    def _assign(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        while self._idle:
            worker = max(self._idle, key=lambda name: self._units_per_s.get(name, 0.0))
            units = self._next_units(worker, now) or self._straggling_units(now)
            if not units:
                break
            del self._idle[worker]
            self._num_leases += 1
            self._leases[worker] = _Lease(self._num_leases, units, now, uncopied=len(units))
            decisions.append(Work(worker, self._num_leases, units))
        return decisions

    def _next_units(self, worker: str, now: float) -> tuple[int, ...]:
        size = self._lease_size(worker)
        while self._returned and self._returned[0][0] <= now:
            not_before, piece = heapq.heappop(self._returned)
            self._queued -= len(piece)
            if units := self._uncovered(piece):  # a straggler may have committed them meanwhile
                self._put_back(not_before, units[size:])
                return units[:size]
        units = tuple(self._fresh[self._cursor : self._cursor + size].tolist())
        self._cursor += len(units)
        self._queued -= len(units)
        return units

    def _lease_size(self, worker: str) -> int:
        """Units for one commit interval at the worker's speed; towards the end for half of the time that all need for the rest."""
        if worker not in self._units_per_s:
            return 1  # learn how fast it is
        rest_s = self._queued / (self._mean_speed() * self._num_present)
        size = round(min(self.commit_interval_s, rest_s / 2) * self._units_per_s[worker])
        return max(1, min(size, PIECES * self._last_size[worker]))  # a few units that were quick say little of many

    def _mean_speed(self) -> float:
        """Units per second of one worker."""
        return sum(self._units_per_s.values()) / len(self._units_per_s)

    def _straggling_units(self, now: float) -> tuple[int, ...]:
        """A piece of an overdue lease."""
        mean = self._mean_speed() if self._units_per_s else 1 / self.commit_interval_s  # a first unit may hang, too
        for worker, lease in self._leases.items():
            if lease.uncopied == 0:
                continue
            due_s = len(lease.units) / max(mean, self._units_per_s.get(worker, mean)) + self.commit_interval_s / 20
            if now - lease.since > self.straggler_factor * due_s and (piece := self._copy(lease)):
                return piece
        return ()

    def _copy(self, lease: _Lease) -> tuple[int, ...]:
        """The last piece that nobody copies yet; the first one only when all others are committed."""
        start, end = max(0, lease.uncopied - lease.piece_size), lease.uncopied
        if self.covered[lease.units[0]] or (start == 0 and self._uncovered(lease.units[end:])):
            return ()
        lease.uncopied = start
        return lease.units[start:end]
