"""Who does which unit: a pure state machine. Events in, decisions out; no clock, no files, no ray.

A lease is a set of units that one worker computes and commits as one object. A lease that is lost goes back to the queue, unit by
unit, so that a unit that kills its worker is found alone, and after a pause that grows, so that a short outage of the storage passes
by itself. A worker that fails is replaced, whatever the error: a broken GPU must not get the next lease. When the queue is empty, a
lease that takes several times its due is given to a second worker: whichever commits first counts, and the ledger's rule leaves the
other out.
"""

from __future__ import annotations

import statistics
from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np

FIRST_PAUSE_S = 1.0
"""Before a unit that failed once is tried again; four times as long after each further failure."""

# --- events: what happened ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A worker is ready for its first lease."""

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
    since: float
    copied: bool = False


@dataclass
class Coordinator:
    """Args:
    covered: bool [num_units], units that count already.
    commit_interval_s: how long a lease should take.
    max_failures: deaths that one unit may cause, and that each place for a worker may see without any commit between them.
    straggler_factor: a lease that takes this many times its due is given out again, once the queue is empty.
    """

    covered: np.ndarray
    commit_interval_s: float = 30.0
    max_failures: int = 3
    straggler_factor: float = 4.0

    finished: bool = field(default=False, init=False)
    num_lost: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.covered = self.covered.copy()
        self._fresh = np.flatnonzero(~self.covered)
        self._cursor = 0
        self._returned: deque[tuple[float, int]] = deque()  # (not before, unit)
        self._leases: dict[str, _Lease] = {}
        self._idle: dict[str, None] = {}  # insertion order: the longest idle first
        self._failures: Counter[int] = Counter()
        self._unit_seconds: deque[float] = deque(maxlen=64)
        self._failures_in_a_row = 0
        self._most_workers = 1  # at once, since the last commit
        self._num_leases = 0
        self._remaining = len(self._fresh)

    @property
    def num_done(self) -> int:
        return len(self.covered) - self._remaining

    def handle(self, event: Event) -> list[Decision]:
        if self.finished:
            return []
        match event:
            case Joined(worker, now):
                self._idle[worker] = None
                self._most_workers = max(self._most_workers, len(self._leases) + len(self._idle))
            case Done(worker, lease, now):
                if not self._holds(worker, lease):
                    return []
                self._commit(worker, now)
                self._idle[worker] = None
            case Lost(worker, cause, now):
                self.num_lost += 1
                self._idle.pop(worker, None)
                if abort := self._take_back(worker, cause, now):
                    return abort
                return [Spawn(cause), *self._assign(now)]
            case Tick(now):
                pass  # assignment below looks for stragglers
        if self._remaining == 0:
            self.finished = True
            return [Finish()]
        return self._assign(now)

    # --- bookkeeping ---------------------------------------------------------------------------------------------------

    def _holds(self, worker: str, lease: int) -> bool:
        return worker in self._leases and self._leases[worker].id == lease

    def _commit(self, worker: str, now: float) -> None:
        lease = self._leases.pop(worker)
        self._unit_seconds.append(max(now - lease.since, 1e-6) / len(lease.units))
        self._failures_in_a_row = 0
        self._most_workers = len(self._leases) + len(self._idle) + 1
        for unit in lease.units:
            if not self.covered[unit]:
                self.covered[unit] = True
                self._remaining -= 1

    def _take_back(self, worker: str, cause: str, now: float) -> list[Decision]:
        self._failures_in_a_row += 1
        lease = self._leases.pop(worker, None)
        elsewhere = {unit: other for other in self._leases.values() for unit in other.units}
        for unit in lease.units if lease else ():
            self._failures[unit] += 1
            if self._failures[unit] > self.max_failures:
                return self._abort(f"unit {unit} failed {self._failures[unit]} times, last: {cause}")
            if unit in elsewhere:
                elsewhere[unit].copied = False  # its copy, or the original, is gone: it may be copied again
            elif not self.covered[unit]:
                self._returned.append((now + FIRST_PAUSE_S * 4.0 ** (self._failures[unit] - 1), unit))
        if self._failures_in_a_row > self.max_failures * self._most_workers:
            return self._abort(f"{self._failures_in_a_row} failures without one commit, last: {cause}")
        return []

    def _abort(self, cause: str) -> list[Decision]:
        self.finished = True
        return [Abort(cause)]

    # --- leases --------------------------------------------------------------------------------------------------------

    def _assign(self, now: float) -> list[Decision]:
        decisions: list[Decision] = []
        for worker in list(self._idle):
            units = self._next_units(now) or self._straggling_units(now)
            if not units:
                break
            del self._idle[worker]
            self._num_leases += 1
            self._leases[worker] = _Lease(self._num_leases, units, now)
            decisions.append(Work(worker, self._num_leases, units))
        return decisions

    def _next_units(self, now: float) -> tuple[int, ...]:
        for _ in range(len(self._returned)):
            not_before, unit = self._returned.popleft()
            if self.covered[unit]:
                continue
            if not_before <= now:
                return (unit,)
            self._returned.append((not_before, unit))
        left = len(self._fresh) - self._cursor
        size = min(left, self._lease_size(left))
        units = self._fresh[self._cursor : self._cursor + size].tolist()
        self._cursor += size
        return tuple(units)

    def _lease_size(self, left: int) -> int:
        """Units for about one commit interval, fewer towards the end so that all workers end together."""
        if not self._unit_seconds:
            return 1  # learn how long a unit takes
        by_time = self.commit_interval_s / statistics.median(self._unit_seconds)
        num_workers = len(self._leases) + len(self._idle)
        return max(1, min(int(by_time), -(-left // (2 * num_workers))))

    def _straggling_units(self, now: float) -> tuple[int, ...]:
        if not self._unit_seconds:
            return ()
        due = self.straggler_factor * statistics.median(self._unit_seconds)
        for lease in self._leases.values():
            if not lease.copied and now - lease.since > due * len(lease.units) + self.commit_interval_s:
                lease.copied = True
                return lease.units
        return ()
