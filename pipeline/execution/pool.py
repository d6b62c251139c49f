"""Workers as Ray actors: one GPU each, or a fixed number of CPU threads.

Actors are never restarted by Ray (max_restarts=0): a restarted actor would come back with empty sums and answer as if nothing had
happened. Every error means that the lease is lost; a worker is killed before another takes its place, since it may still be alive.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import torch
from ray._private.state import state as cluster_state
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipeline.artifacts import StaleArtifact, StorageError
from pipeline.execution import metrics
from pipeline.execution.coordinator import Done, Event, Joined, Lost, Tick
from pipeline.execution.drive import PassFailed
from pipeline.execution.ledger import ForeignDevice
from pipeline.execution.machine import keep_freed_memory
from pipeline.execution.team import Team
from pipeline.execution.worker import Pass, UnitWorker
from pipeline.saliency.exact import Grid, Magnitudes

LOST = (RayActorError, OutOfMemoryError, ObjectLostError, NodeDiedError, WorkerCrashedError)
FATAL = (
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    KeyError,
    NotImplementedError,
    StorageError,
    StaleArtifact,
)
"""Errors that would come again on any worker: bad input, a bug, a full disk. Others (a flaky network, CUDA) are tried again."""


def is_fatal(error: BaseException | None) -> bool:
    return isinstance(error, FATAL) and not (isinstance(error, StorageError) and error.may_pass)


LOOK_EVERY_S = 5.0
"""How often a growing pool asks the cluster for its size."""
NODE_TIMEOUT_S = 1800.0
"""For the first node that an autoscaler brings: it may wait for spot capacity, and loads its image."""
TELL_EVERY_S = 60.0
"""How often a pool that has no worker says what it waits for."""
CLOSE_TIMEOUT_S = 30.0
"""For what closed workers held. Who takes it next waits for it in any case."""

logger = logging.getLogger(__name__)


def connect(address: str | None, num_cpus: int | None = None) -> None:
    """Join the cluster of this job, of `address`, or start a local one. Does nothing when connected already."""
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    options: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    in_job = address or os.environ.get("RAY_ADDRESS")
    if in_job:
        ray.init(address=in_job, **options)
        return
    # Train frees its resources after a crash through the dashboard's State API.
    options["include_dashboard"] = True
    for attempt in (1, 2):  # on a busy machine the local node may miss Ray's fixed start-up time
        try:
            ray.init(address="local", num_cpus=num_cpus, **options)
            return
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise


def choose_device(device: str) -> str:
    """`auto` takes GPUs when the cluster has any now; `cuda` waits for nodes that an autoscaler may still bring."""
    gpus = ray.cluster_resources().get("GPU", 0)
    return "cuda" if device == "cuda" or (device == "auto" and gpus) else "cpu"


def worker_resources(device: str, threads: int) -> dict[str, int]:
    """What one worker takes."""
    return {"CPU": threads, "GPU": 1} if device == "cuda" else {"CPU": threads}


def nodes_for_workers(device: str, threads: int) -> dict[str, int]:
    """Nodes that are alive and could hold a worker if nobody else used them -> how many workers."""
    needed = worker_resources(device, threads)
    rooms = {
        node["NodeID"]: min(int(node["Resources"].get(name, 0) // number) for name, number in needed.items())
        for node in ray.nodes()
        if node["Alive"]
    }
    return {node: room for node, room in rooms.items() if room}


def default_num_workers(device: str, threads: int) -> int:
    """As many as the nodes have room for."""
    return max(1, sum(nodes_for_workers(device, threads).values()))


@ray.remote(max_restarts=0, max_task_retries=0)
class _Actor:
    """A UnitWorker in a process of its own, or the first of the processes of a team."""

    def __init__(self, device: str, threads: int, team_size: int) -> None:
        self._worker: UnitWorker | Team
        if team_size == 1:
            keep_freed_memory()
            self._worker = UnitWorker(torch.device(device), threads)
        else:
            self._worker = Team(device, threads, team_size, worker_resources(device, threads))

    def load(self, work: Pass, grid: Grid | None) -> None:
        self._worker.load(work)
        if grid is not None:
            self._worker.fix_grid(grid)

    def fix_grid(self, grid: Grid) -> None:
        self._worker.fix_grid(grid)

    def pilot(self) -> tuple[Magnitudes, str]:
        return self._worker.pilot()

    def work(self, units: tuple[int, ...]) -> int:
        commit = self._worker.work(units)
        metrics.count("pruning_rows", commit.rows)
        metrics.count("pruning_skipped_rows", len(commit.bad_rows))
        metrics.count("pruning_units", len(units))
        metrics.count("pruning_commits", 1)
        return len(commit.bad_rows)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)


class RayPool:
    """`num_workers` actors. Workers may come and go; a pass goes on with those that are there.

    Args:
        num_workers: workers to ask for; those for which the cluster has no room yet join when it has.
        device: "cuda" or "cpu".
        threads: CPU threads of one process's computation; part of the bits on a CPU.
        team_size: processes of a worker, which hold networks together (`team`).
        grow: also use what the cluster gains while a pass runs.
        start_timeout_s: how long to wait for the first worker.
    """

    def __init__(
        self,
        num_workers: int,
        device: str,
        threads: int,
        *,
        team_size: int = 1,
        grow: bool = False,
        start_timeout_s: float = 300.0,
    ) -> None:
        self.num_workers = num_workers
        self.device = device
        self.threads = threads
        self.team_size = team_size
        self.grow = grow
        self.start_timeout_s = start_timeout_s
        self._looked = self._at_work = time.monotonic()
        self._num_foreign = 0
        self._actors: dict[str, Any] = {}
        self._groups: dict[str, PlacementGroup] = {}  # of teams: a place for each process, all of them or none
        self._pending: dict[Any, tuple[str, int]] = {}  # object ref -> (worker, lease; 0 for loading a pass)
        self._work: Any = None
        self._grid: Grid | None = None
        self._next = 0
        for _ in range(num_workers):
            self._create()

    def _create(self) -> str:
        name = f"w{self._next}"
        self._next += 1
        needed = worker_resources(self.device, self.threads)
        options: dict[str, Any] = {
            "num_cpus": needed["CPU"],
            "num_gpus": needed.get("GPU", 0),
            "scheduling_strategy": "SPREAD",
        }
        if self.team_size > 1:
            group = placement_group([needed] * self.team_size, strategy="PACK")
            self._groups[name] = group
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=0)
        actor: Any = _Actor  # what @ray.remote makes of the class
        self._actors[name] = actor.options(**options).remote(self.device, self.threads, self.team_size)
        return name

    def start(self, work: Pass) -> None:
        self._work, self._grid = ray.put(work), None
        for name in list(self._actors):
            self._load(name)
        self._wait_for_first()

    def _load(self, name: str) -> None:
        self._pending[self._actors[name].load.remote(self._work, self._grid)] = (name, 0)

    def pilot(self) -> tuple[Magnitudes, str]:
        """Of the first unit, from the first worker that is ready; another takes over when it dies."""
        cause: BaseException | None = None
        for _ in range(4):
            loaded = self._wait_for_first()
            name, _ = self._pending[loaded]
            try:
                ray.get(loaded)
                return ray.get(self._actors[name].pilot.remote())
            except LOST as error:
                cause = error
            except RayTaskError as error:
                if is_fatal(error.cause):
                    self._drop(name)
                    raise error.cause from None
                cause = error.cause
            self._drop(name)
            self.spawn()
        raise PassFailed(
            f"four workers failed in the first unit, the last with {_first_line(cause)}. If it is memory, lower the rows of a "
            "micro-batch (score.micro_batch, calibrate.batch_size, evaluate.batch_size)."
        )

    def _wait_for_first(self) -> Any:
        """The loading of the first worker that has come to an end with it, well or not."""
        can_grow = bool(cluster_state.get_max_resources_from_cluster_config())
        timeout_s = max(self.start_timeout_s, NODE_TIMEOUT_S) if can_grow else self.start_timeout_s
        deadline = time.monotonic() + timeout_s
        ready: list[Any] = []
        while not ready and (left_s := deadline - time.monotonic()) > 0:
            ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=min(left_s, TELL_EVERY_S))
            if not ready:
                self._tell_what_is_missing()
        if not ready:
            raise PassFailed(
                f"no worker started within {timeout_s:.0f} s. Each asks for {self._size}{self.threads} CPU"
                f"{' and 1 GPU' if self.device == 'cuda' else ''}; the cluster has {ray.available_resources()} free. Give it such nodes, "
                "or ask for less with workers.device, workers.num_workers or workers.threads."
            )
        return ready[0]

    def _tell_what_is_missing(self) -> None:
        room = sum(nodes_for_workers(self.device, self.threads).values())
        logger.warning(
            "no worker is at work: %d wait for %s%s each; the nodes have room for %d, were they used by nobody else",
            len(self._actors),
            self._size,
            worker_resources(self.device, self.threads),
            room // self.team_size,
        )

    @property
    def _size(self) -> str:
        return f"{self.team_size} times " if self.team_size > 1 else ""

    def fix_grid(self, grid: Grid) -> None:
        self._grid = grid
        for actor in self._actors.values():
            actor.fix_grid.remote(grid)  # queued behind load; a dead actor shows at its next lease

    def assign(self, worker: str, lease: int, units: tuple[int, ...]) -> None:
        self._pending[self._actors[worker].work.remote(units)] = (worker, lease)

    def spawn(self) -> None:
        self._load(self._create())

    def _take_new_nodes(self) -> None:
        """One more worker for each that the cluster has room for now and had not before."""
        if not self.grow or time.monotonic() - self._looked < LOOK_EVERY_S:
            return
        self._looked = time.monotonic()
        room = default_num_workers(self.device, self.threads) // self.team_size - self._num_foreign
        for _ in range(room - len(self._actors)):
            self.spawn()
        self.num_workers = max(self.num_workers, len(self._actors))

    def events(self, timeout_s: float) -> list[Event]:
        self._take_new_nodes()
        if not self._pending:
            time.sleep(timeout_s)
            return [Tick(time.monotonic())]
        ready, _ = ray.wait(list(self._pending), num_returns=1, timeout=timeout_s)
        if ready or any(lease for _, lease in self._pending.values()):
            self._at_work = time.monotonic()
        elif time.monotonic() - self._at_work > TELL_EVERY_S:  # every node is gone; the pass goes on when one comes
            self._at_work = time.monotonic()
            self._tell_what_is_missing()
        if not ready:
            return [Tick(time.monotonic())]
        return [self._event(reference) for reference in ready]

    def _event(self, reference: Any) -> Event:
        worker, lease = self._pending.pop(reference)
        now = time.monotonic()
        try:
            num_bad = ray.get(reference)
        except LOST as error:
            self._lose(worker, lease)
            return Lost(worker, _first_line(error), now)
        except RayTaskError as error:
            if is_fatal(error.cause):
                self._drop(worker)  # of a team, the others still wait for the one that failed
                raise error.cause from None
            self._lose(worker, lease)
            foreign = isinstance(error.cause, ForeignDevice)
            if foreign:  # another one in its place would most likely be as foreign
                self._num_foreign += 1
                if not self._actors:
                    raise PassFailed(str(error.cause)) from None
            return Lost(worker, _first_line(error.cause), now, replace=not foreign)
        return Done(worker, lease, now, num_bad) if lease else Joined(worker, now)

    def _lose(self, worker: str, lease: int) -> None:
        if lease:
            metrics.count("pruning_lost_leases", 1)
        self._drop(worker)

    def _drop(self, worker: str) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            ray.kill(actor, no_restart=True)
        if worker in self._groups:
            remove_placement_group(self._groups.pop(worker))  # and with it whoever is in there
        self._pending = {reference: value for reference, value in self._pending.items() if value[0] != worker}

    def finish(self) -> None:
        """Workers that still compute a lease somebody else has committed are replaced: their work is of no use."""
        for worker, lease in list(self._pending.values()):
            if lease:
                self._drop(worker)
                self._create()
        self._pending.clear()
        self._work = None

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Run a function in one worker, on its device."""
        cause: BaseException | None = None
        for _ in range(4):
            name = next(iter(self._actors))
            try:
                return ray.get(self._actors[name].call.remote(function, *args))
            except LOST as error:
                cause = error
                self._drop(name)
                self._create()
            except RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
        raise PassFailed(f"four workers died one after the other, the last with {_first_line(cause)}.")

    def close(self) -> None:
        """Free the workers' GPUs and CPUs, and wait until they are free: a node gives them back when the process, and its memory, is gone."""
        num_alive, free = self._num_alive(), ray.available_resources()
        for name in list(self._actors):
            self._drop(name)
        needed = worker_resources(self.device, self.threads)
        # Others on the cluster may hold the rest.
        wanted = {name: free.get(name, 0) + num_alive * self.team_size * number for name, number in needed.items()}
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while time.monotonic() < deadline:
            total, now = ray.cluster_resources(), ray.available_resources()
            if all(now.get(name, 0) >= min(number, total.get(name, 0)) for name, number in wanted.items()):
                return
            time.sleep(0.1)

    def _num_alive(self) -> int:
        """Workers that hold something: neither dead nor waiting for room."""
        answers = [actor.call.remote(os.getpid) for actor in self._actors.values()]
        done, _ = ray.wait(answers, num_returns=len(answers), timeout=1.0) if answers else ([], [])
        alive = 0
        for answer in done:
            with suppress(*LOST):
                ray.get(answer)
                alive += 1
        return alive


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"
