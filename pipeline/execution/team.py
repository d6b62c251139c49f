"""Teams: workers that hold every network together, each some rows of its weights, and compute units together.

To the coordinator a team is one worker. Its members all do what it is told, at the same time: of each unit, member i of k takes the
micro-batches i, i + k ... and forwards and backwards go on in step, since weights are gathered from all (`models.sharding`).

What comes out has the bits of a worker that holds all and takes one micro-batch after the other. Sums of a micro-batch go to member 0, which
adds them in the order of the micro-batches; gradients of weights are exchanged before anything is summed, so that each member adds up, in
the same order, its rows of every micro-batch's gradient. A commit is written by member 0, which gets the others' rows tensor by
tensor: it is like any other commit.

Whatever goes wrong in one member leaves the others waiting: the whole team is given up, and its lease with it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor, nn

from pipeline.data.batches import Batch
from pipeline.execution.ledger import Commit
from pipeline.execution.machine import COLLECTIVE_TIMEOUT_S, bind_gloo, free_port, give_back_memory
from pipeline.execution.worker import MEMORY_FORMAT, Pass, UnitWorker
from pipeline.models.sharding import Network, Sharded, Take, build_mesh, explained, shares_of
from pipeline.models.task import CHECKED_ROWS, Task, add_
from pipeline.saliency.exact import Grid, Magnitudes, base

LOOK_EVERY_S = 0.2
"""How often a leader at work looks whether a member has failed."""


class Member(UnitWorker):
    """One process of a team.

    Args:
        rank, size: of this member, and of the team.
        address: "host:port" of member 0, where the members meet.
    """

    def __init__(self, device: torch.device, threads: int, rank: int, size: int, address: str) -> None:
        super().__init__(device, threads)
        self.rank, self.size = rank, size
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"tcp://{address}",
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        mesh = build_mesh(size, size, device)
        assert mesh is not None
        self._mesh = mesh
        self._sharded: list[Sharded] = []
        self._whole: dict[str, tuple[int, ...]] = {}
        """Shapes of the sums of which each member has rows."""

    def _place(self, task: Task) -> None:
        self._sharded = []
        gc.collect()  # networks of the pass before hang in circles of hooks
        task.place(self._in_rows)

    def _in_rows(self, network: Network, names: Collection[str] = (), take: Take | None = None) -> nn.Module:
        """A `Place`."""
        if isinstance(network, nn.Module) and not any(True for _ in network.parameters()):  # a session of ONNX Runtime
            return network.eval()
        sharded = Sharded(network, self._mesh, self.device, trains=False)
        sharded.hand_over(names, take)
        self._sharded.append(sharded)
        return sharded.replica.eval()

    @property
    def networks(self) -> list[nn.Module]:
        """Of the pass, in rows."""
        return [sharded.replica for sharded in self._sharded]

    def meet(self) -> None:
        """Does nothing: that it answers means that this member has joined the others."""

    # --- a unit ---------------------------------------------------------------------------------------------------------

    def _batches(self, units: Sequence[int], share: tuple[int, int] = (0, 1)) -> Iterator[Batch | None]:
        """This member's micro-batches; an empty one where the others still have one, so that all have equally many."""
        assert self._pass is not None
        micro_batch = self._pass.micro_batch
        for unit in units:
            batches = super()._batches([unit], share=(self.rank, self.size))
            num_batches = -(-self._pass.units[unit].num_rows // micro_batch)
            for _ in range(-(-num_batches // self.size)):
                batch = next(batches)
                yield Batch.empty(self._pass.decoder.size) if batch is None else batch
            yield None

    def _unit(self, batches: Iterator[Batch | None]) -> tuple[dict[str, Tensor], int, list[dict[str, Any]]]:
        """On member 0 all sums, on the others their rows of those that the task collects; rows and bad rows of the whole team."""
        assert self._pass is not None
        task, sums = self._pass.task, dict[str, Tensor]()
        counts: list[tuple[int, list[dict[str, Any]]]] = []
        for batch in batches:
            if batch is None:
                break
            counts.append((len(batch.labels_N), [asdict(row) for row in batch.bad_rows]))
            with explained():
                mine = self._step(task, *self._on_device(batch))
            for theirs in self._gathered(mine):
                add_(sums, theirs)
        in_order = [share for step in zip(*self._exchanged(counts), strict=True) for share in step]
        rows, bad_rows = sum(rows for rows, _ in in_order), [row for _, bad in in_order for row in bad]
        sums = {name: value.to(self.device) for name, value in sums.items()}  # where the rows of the others are
        return sums | self._collected(task), rows, bad_rows

    def _step(self, task: Task, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Sums of this member's micro-batch, on the CPU; none if it has no rows."""
        self._check(task, images, labels)
        if len(labels):
            return {name: value.cpu() for name, value in task(images, labels).items()}
        # No zeros: some networks divide by the variance of an image.
        noise = torch.rand(1, *images.shape[1:], generator=torch.Generator().manual_seed(0))
        task.idle(noise.to(self.device, memory_format=MEMORY_FORMAT))
        return {}

    def _collected(self, task: Task) -> dict[str, Tensor]:
        sums = task.collect()
        shapes = {name: tuple(shape) for sharded in self._sharded for name, shape in sharded.shapes.items()}
        self._whole = {name: shapes[name.partition("/")[2]] for name in sums}
        return sums

    def _check(self, task: Task, images: Tensor, labels: Tensor) -> None:
        """All members check the same rows: those of the first member that has some."""
        if self._checked:
            return
        everyones = self._exchanged((images[:CHECKED_ROWS].cpu(), labels[:CHECKED_ROWS].cpu()))
        for some_images, some_labels in everyones:
            if len(some_labels) > 1:
                task.check(some_images.to(self.device), some_labels.to(self.device))
                self._checked = True
                return

    def _gathered(self, mine: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """On member 0 what all members give, in their order; on the others nothing."""
        everyones: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, everyones)
        return everyones or []

    def _exchanged(self, mine: Any) -> list[Any]:
        everyones: list[Any] = [None] * self.size
        dist.all_gather_object(everyones, mine)
        return everyones

    def _magnitudes(self, sums: dict[str, Tensor]) -> Magnitudes:
        """Of the whole sums: those that are in rows are as large as the largest rows."""
        found: Magnitudes = {}
        for theirs in self._exchanged(super()._magnitudes(sums)):
            for name, tops in theirs.items():
                both = torch.tensor([tops, found.get(name, tops)], dtype=torch.float64)
                found[name] = both.amax(0).tolist()  # NaN where there is one
        return found

    # --- a commit -------------------------------------------------------------------------------------------------------

    def _commit(
        self, units: tuple[int, ...], rows: int, totals: dict[str, Tensor], bad_rows: tuple[dict[str, Any], ...]
    ) -> Commit:
        assert self._pass is not None
        mine = {name: self._whole.get(base(name), tuple(total.shape)) for name, total in totals.items()}
        shapes = {name: shape for theirs in self._exchanged(mine) for name, shape in theirs.items()}
        commit = _CommonCommit(units, rows, totals, bad_rows, whole=shapes, get=self._total)
        if self.rank == 0:
            self._pass.ledger.write(commit)
        else:
            for name in sorted(shapes):
                commit.total(name)
        return commit

    def _total(self, totals: Mapping[str, Tensor], name: str) -> Tensor:
        """On member 0 the whole sum, to which the others add their rows."""
        if base(name) not in self._whole:
            return totals[name] if self.rank == 0 else torch.zeros(0)
        num_rows, *row = self._whole[base(name)]
        shares = shares_of(num_rows, self.size)
        mine = shares[self.rank][1] - shares[self.rank][0]
        # A member none of whose elements are on the coarse grid has no total of it.
        rows = totals[name].cpu() if name in totals else torch.zeros(mine, *row, dtype=torch.int64)
        if self.rank > 0:
            if mine:
                dist.send(rows.contiguous(), dst=0)
            return rows
        whole = torch.zeros(num_rows, *row, dtype=torch.int64)
        whole[:mine] = rows
        for rank, (start, stop) in enumerate(shares):
            if rank > 0 and stop > start:
                dist.recv(whole[start:stop], src=rank)
        return whole


@dataclass(frozen=True, kw_only=True)
class _CommonCommit(Commit):
    """Whose sums lie with several members."""

    whole: Mapping[str, tuple[int, ...]]
    get: Callable[[Mapping[str, Tensor], str], Tensor]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.whole

    def total(self, name: str) -> Tensor:
        return self.get(self.totals, name)


# --- on a cluster -----------------------------------------------------------------------------------------------------


@ray.remote(max_restarts=0, max_task_retries=0)
class _Follower:
    """Another member, in a process of its own."""

    def __init__(self, device: str, threads: int, rank: int, size: int, address: str) -> None:
        give_back_memory()
        bind_gloo()
        self._member = Member(torch.device(device), threads, rank, size, address)

    def do(self, method: str, *arguments: Any) -> None:
        getattr(self._member, method)(*arguments)


class Team:
    """A UnitWorker to its actor: member 0, which makes the others, tells them all that it does, and takes them along when it ends.

    Args:
        resources: of each member. The actor is in bundle 0 of a placement group with a bundle for each.
    """

    def __init__(self, device: str, threads: int, size: int, resources: Mapping[str, int]) -> None:
        address = f"{ray.util.get_node_ip_address()}:{free_port()}"
        give_back_memory()
        bind_gloo()
        group = get_current_placement_group()
        assert group is not None
        follower: Any = _Follower
        self._followers = [
            follower.options(
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(device, threads, rank, size, address)
            for rank in range(1, size)
        ]
        # A thread of its own, all its life: a process waits for the others in it, while this one looks after them.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="member")
        ready = [follower.do.remote("meet") for follower in self._followers]
        make = partial(Member, torch.device(device), threads, 0, size, address)
        self._member: Member = self._wait(self._thread.submit(make), ready)

    def load(self, work: Pass) -> None:
        shared = ray.put(work)  # once, not for each follower
        answers = [follower.do.remote("load", shared) for follower in self._followers]
        self._wait(self._thread.submit(self._member.load, work), answers)

    def fix_grid(self, grid: Grid) -> None:
        self._all("fix_grid", grid)

    def pilot(self) -> tuple[Magnitudes, str]:
        found: tuple[Magnitudes, str] = self._all("pilot")
        return found

    def work(self, units: Sequence[int]) -> Commit:
        commit: Commit = self._all("work", units)
        return commit

    def _all(self, method: str, *arguments: Any) -> Any:
        answers = [follower.do.remote(method, *arguments) for follower in self._followers]
        return self._wait(self._thread.submit(getattr(self._member, method), *arguments), answers)

    def _wait(self, mine: Future[Any], answers: list[Any]) -> Any:
        """The result of member 0 when all are done; the first error of any."""
        while answers or not mine.done():
            if answers:
                done, answers = ray.wait(answers, num_returns=1, timeout=LOOK_EVERY_S)
            else:
                done, _ = [], wait([mine], timeout=LOOK_EVERY_S)
            for answer in done:
                try:
                    ray.get(answer)
                except RayTaskError as error:
                    raise error.cause if isinstance(error.cause, Exception) else error from None
            if mine.done():
                mine.result()
        return mine.result()
