"""Allocation: how many channels each group keeps, so that a budget is met and the least saliency is lost.

# C = channels of a group, G = groups, T = tensors, D = dimensions of a tensor

Channels go in chunks: `round_to` at a time in groups of more than 32 (hardware likes round widths), one at a time in
smaller ones. Each scope fixes an order in which chunks go; all then end alike: the first state within the budget is
found, and what the last step took too much is given back. Costs are always those of the current state, since the cost
of a layer depends on both of its sides.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.costs import CostModel
from pipeline.models.graph import Graph, Group
from pipeline.pruning.plan import Budget, Plan, planned

Int64 = NDArray[np.int64]

Rank = Callable[[int, int, int], tuple[float, ...]]

SMALL_GROUP = 32
"""Up to this size a group goes channel by channel: rounding to 8 would leave it four choices."""
FINE_STEP_ABOVE = 0.005
"""If whole chunks leave more than this part of the target unused, single channels are given back against `round_to`."""
BISECTIONS = 60


def plan(
    graph: Graph,
    saliency: Mapping[str, Tensor],
    budget: Budget,
    *,
    criterion: str = "",
    scope: str = "global",
    min_keep: float = 0.1,
    round_to: int = 8,
) -> Plan:
    """Choose the channels that stay.

    Args:
        graph: channel groups of the dense network.
        saliency: group name -> [C], higher = keep. +inf keeps a channel in any case. Of equals the first index stays;
            of equally good chunks the one of the first group name goes.
        budget: what must remain.
        criterion: recorded in the plan, not used.
        scope: a name in SCOPES: how groups compete.
        min_keep: fraction of each group that stays in any case; at least one channel, rounded up to `round_to`.
        round_to: groups of more than 32 channels keep a multiple of this, or all; a finer step is taken only if the
            target would be missed by more than 0.5 % without.

    Returns:
        A plan whose cost is at most the budget, and so close below that no removed chunk fits in between.

    Raises:
        ValueError: the saliency does not fit the graph, or the budget cannot be reached above the floors.
    """
    order = SCOPES.get(scope)
    if order is None:
        raise ValueError(f"scope {scope!r} is unknown; known scopes: {', '.join(SCOPES)}.")
    if not 0 <= min_keep < 1:
        raise ValueError(
            f"min_keep ({min_keep}) must be at least 0 and below 1: the fraction of each group that stays, like 0.1."
        )
    if round_to < 1:
        raise ValueError(f"round_to ({round_to}) must be at least 1; 1 rounds nothing, 8 suits most devices.")
    ranked = _ranked(graph, saliency)
    state = _State(graph, ranked, budget, min_keep, round_to)
    state.check_reachable(min_keep, round_to)
    order(state)
    kept = {group.name: np.sort(ranked[g].order[state.removed_G[g] :]) for g, group in enumerate(graph.groups)}
    return planned(
        graph, {name: torch.from_numpy(k) for name, k in kept.items()}, budget=budget, criterion=criterion, scope=scope
    )


# --- what the scopes have in common ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ranked:
    """The channels of one group in the order in which they go."""

    order: Int64
    """[C] channel indices by rising saliency; of equals the last index first."""
    rising: list[float]
    """[C] saliency in that order."""
    num_free: int
    """Channels of finite saliency."""


def _ranked(graph: Graph, saliency: Mapping[str, Tensor]) -> list[_Ranked]:
    names = {group.name for group in graph.groups}
    if unknown := sorted(set(saliency) - names):
        raise ValueError(
            f"saliency names groups that the graph lacks: {', '.join(unknown[:5])}. Score and trace the same network."
        )
    return [_rank(group, saliency.get(group.name)) for group in graph.groups]


def _rank(group: Group, score: Tensor | None) -> _Ranked:
    if score is None:
        raise ValueError(f"saliency lacks group {group.name}. Score it, or freeze it with Graph.without.")
    score_C = score.detach().double().cpu().numpy()
    if score_C.shape != (group.size,):
        raise ValueError(
            f"saliency of group {group.name} has shape {list(score_C.shape)}, the group has {group.size} channels."
        )
    if not (score_C > -np.inf).all():
        worst = int(np.flatnonzero(~(score_C > -np.inf))[0])
        raise ValueError(
            f"saliency of group {group.name} is {score_C[worst]} at channel {worst}. The network or its loss gave no "
            "number there: look at the statistics of this group, or freeze it with Graph.without."
        )
    order = np.lexsort((-np.arange(group.size), score_C))
    return _Ranked(order, score_C[order].tolist(), int(np.isfinite(score_C).sum()))


class _State:
    """How many channels each group has lost, and what that saves in the budget's measure."""

    def __init__(self, graph: Graph, ranked: Sequence[_Ranked], budget: Budget, min_keep: float, round_to: int) -> None:
        self.groups = graph.groups
        self.shapes = graph.shapes
        self.ranked = ranked
        self.budget = budget
        self.model = CostModel(graph)
        self.factors_T = self.model.factors_T[budget.measure]
        size_G = [group.size for group in graph.groups]
        self.unit_G = [round_to if size > max(SMALL_GROUP, round_to) else 1 for size in size_G]
        # 0.1 * 30 is a little more than 3; that a floor is rounded up to the unit follows from whole chunks.
        floor_G = [max(1, math.ceil(min_keep * size - 1e-9)) for size in size_G]
        self.limit_G = np.array(
            [min(size - floor, r.num_free) for size, floor, r in zip(size_G, floor_G, ranked, strict=True)],
            dtype=np.int64,
        )
        """Most channels that a group can lose."""
        self.dense = self.cost_of(np.zeros_like(self.limit_G))
        self.target = math.floor(Fraction(repr(budget.fraction)) * self.dense)  # 0.3 of 1000 is 300, not 299
        self.set(np.zeros_like(self.limit_G))

    def cost_of(self, removed_G: Int64) -> int:
        return int(self.factors_T @ self.model.sizes(removed_G).prod(axis=1))

    def set(self, removed_G: Int64) -> None:
        self.removed_G = removed_G.copy()
        self.sizes_TD = self.model.sizes(removed_G)
        self.cost = int(self.factors_T @ self.sizes_TD.prod(axis=1))

    def delta(self, g: int, num: int) -> int:
        """What the cost changes by if group g loses `num` more channels; a negative number gives them back."""
        rows, widths = self.model.rows[g], self.model.widths[g]
        before_TD = self.sizes_TD[rows]
        change_T = (before_TD - num * widths).prod(axis=1) - before_TD.prod(axis=1)
        return int(self.factors_T[rows] @ change_T)

    def remove(self, g: int, num: int, delta: int) -> None:
        self.removed_G[g] += num
        self.sizes_TD[self.model.rows[g]] -= num * self.model.widths[g]
        self.cost += delta

    def next_chunk(self, g: int, removed: int) -> int:
        """Channels that go next if `removed` are gone: down to a multiple of the unit; 0 at the floor."""
        keep = self.groups[g].size - removed
        chunk = keep % self.unit_G[g] or self.unit_G[g]
        return chunk if removed + chunk <= self.limit_G[g] else 0

    def last_chunk(self, g: int) -> int:
        """Channels that went last: back up to the next multiple of the unit, or to the whole group."""
        unit = self.unit_G[g]
        keep = self.groups[g].size - int(self.removed_G[g])
        return min(int(self.removed_G[g]), unit - keep % unit)

    def lost(self, g: int, start: int, stop: int) -> float:
        """Saliency of the channels start..stop in the group's order; an exact sum is the same everywhere."""
        return math.fsum(self.ranked[g].rising[start:stop])

    def check_reachable(self, min_keep: float, round_to: int) -> None:
        floors_G = np.array([self._floor_removed(g) for g in range(len(self.groups))], dtype=np.int64)
        least = self.cost_of(floors_G)
        if least > self.target:
            measure, fraction = self.budget.measure, self.budget.fraction
            reachable = math.ceil(10_000 * Fraction(least, self.dense)) / 10_000  # up: this fraction can be asked for
            way_out = f"Ask for {measure}={reachable:.4f} or more, lower" if reachable < 1 else "Lower"
            raise ValueError(
                f"budget {measure}={fraction} asks for {self.target:,} of {self.dense:,} {measure}, but at least "
                f"{least:,} remain: the smallest reachable fraction is {reachable:.4f}. {way_out} min_keep "
                f"(now {min_keep}) or round_to (now {round_to}), or see in graph.frozen what stays whole."
            )

    def _floor_removed(self, g: int) -> int:
        removed = 0
        while chunk := self.next_chunk(g, removed):
            removed += chunk
        return removed

    def give_back(self, rank: Rank) -> None:
        """Give back the last chunks, best first, until none fits under the target; if that is coarse, single channels.

        rank(g, chunk, cost) orders the candidates: the largest first; of equals the first name.
        """
        self._give_back(self.last_chunk, rank)
        if self.target - self.cost > FINE_STEP_ABOVE * self.target:
            self._give_back(lambda g: min(1, int(self.removed_G[g])), rank)

    def _give_back(self, chunk_of: Callable[[int], int], rank: Rank) -> None:
        while self.cost < self.target:
            best: tuple[bool, tuple[float, ...], str] | None = None
            for g, group in enumerate(self.groups):
                if chunk := chunk_of(g):
                    cost = self.delta(g, -chunk)
                    if 0 < cost <= self.target - self.cost:
                        # A group that already left its multiples is filled first, so that few groups end up odd.
                        odd = (group.size - int(self.removed_G[g])) % self.unit_G[g] != 0
                        key = (not odd, tuple(-value for value in rank(g, chunk, cost)), group.name)
                        if best is None or key < best:
                            best, choice = key, (g, chunk, cost)
            if best is None:
                return
            self.remove(choice[0], -choice[1], choice[2])


# --- scopes ----------------------------------------------------------------------------------------------------------


def _global(state: _State) -> None:
    """All groups compete: the chunk with the least saliency per unit of cost goes first.

    A heap that is corrected lazily: a chunk's cost only falls while other groups shrink, so a key only rises, and the
    smallest key that is up to date is the smallest of all.
    """
    heap: list[tuple[float, str, int, int, int, int]] = []
    neighbours = _neighbours(state.model)
    changes = np.zeros(len(state.groups), dtype=np.int64)

    def push(g: int) -> None:
        removed = int(state.removed_G[g])
        if (chunk := state.next_chunk(g, removed)) and (saving := -state.delta(g, chunk)):
            key = _price(state.lost(g, removed, removed + chunk), saving)
            heapq.heappush(heap, (key, state.groups[g].name, g, int(changes[g]), chunk, saving))

    for g in range(len(state.groups)):
        push(g)
    while state.cost > state.target:
        _, _, g, stamp, chunk, saving = heapq.heappop(heap)
        if stamp == changes[g]:
            state.remove(g, chunk, -saving)
            changes[neighbours[g]] += 1
        push(g)
    state.give_back(lambda g, chunk, cost: (_price(_last_lost(state, g, chunk), cost),))


def _price(lost: float, saving: int) -> float:
    """Saliency per unit of cost. Below zero, where loss helps, go first those that save most."""
    return lost / saving if lost >= 0 else lost * saving


def _last_lost(state: _State, g: int, chunk: int) -> float:
    removed = int(state.removed_G[g])
    return state.lost(g, removed - chunk, removed)


def _neighbours(model: CostModel) -> list[Int64]:
    """Groups whose costs depend on group g: they share a tensor with it; g among them."""
    sharing: dict[int, list[int]] = {}
    for g, rows in enumerate(model.rows):
        for t in rows.tolist():
            sharing.setdefault(t, []).append(g)
    return [
        np.array(sorted({other for t in rows.tolist() for other in sharing[t]}), dtype=np.int64) for rows in model.rows
    ]


def _layer(state: _State) -> None:
    """Every group keeps the same fraction."""
    _uniform(state, [[g] for g in range(len(state.groups))])


def _flat(state: _State) -> None:
    """All channels compete by saliency alone, whatever they cost: for scores that are divided by a cost already, and for ranks."""
    _uniform(state, [list(range(len(state.groups)))])


def _isomorphic(state: _State) -> None:
    """Groups of one structure compete among themselves, and every structure keeps the same fraction of its channels.

    Source: Fang et al., "Isomorphic Pruning for Vision Models", ECCV 2024.
    """
    classes: dict[tuple[object, ...], list[int]] = {}
    for g, group in enumerate(state.groups):
        classes.setdefault(_structure(group, state.shapes), []).append(g)
    _uniform(state, list(classes.values()))


def _structure(group: Group, shapes: Mapping[str, Sequence[int]]) -> tuple[object, ...]:
    """What groups share that differ in scale only: roles and the members' shapes, channels as multiples of C."""
    members = []
    for member in group.members:
        shape = shapes[member.tensor]
        relative = [Fraction(size, group.size) if dim < 2 else Fraction(size) for dim, size in enumerate(shape)]
        members.append((member.role, member.dim, member.index_CK.shape[1], tuple(relative)))
    return tuple(sorted(members))


@dataclass(frozen=True)
class _Queue:
    """Chunks of one class of groups in the order in which they go, by saliency per channel."""

    members: tuple[int, ...]
    group_Q: Int64
    chunk_Q: Int64
    total: int
    """Channels of all groups of the class."""

    @classmethod
    def of(cls, state: _State, members: Sequence[int]) -> _Queue:
        entries = []
        for g in members:
            removed = 0
            while chunk := state.next_chunk(g, removed):
                mean = state.lost(g, removed, removed + chunk) / chunk
                entries.append((mean, state.groups[g].name, removed, g, chunk))
                removed += chunk
        entries.sort()
        group_Q, chunk_Q = (np.array([entry[i] for entry in entries], dtype=np.int64) for i in (3, 4))
        return cls(tuple(members), group_Q, chunk_Q, sum(state.groups[g].size for g in members))

    def removed(self, keep_fraction: float, num_groups: int) -> Int64:
        """[G]: channels that each group loses so that the class keeps at least this fraction, within a chunk."""
        num = int(np.searchsorted(np.cumsum(self.chunk_Q), (1 - keep_fraction) * self.total, side="right"))
        removed_G = np.zeros(num_groups, dtype=np.int64)
        np.add.at(removed_G, self.group_Q[:num], self.chunk_Q[:num])
        return removed_G


def _uniform(state: _State, classes: Sequence[Sequence[int]]) -> None:
    """The largest fraction that fits, the same for every class; what rounding left goes to classes that lost most."""
    queues = [_Queue.of(state, members) for members in classes]

    def removed(keep_fraction: float) -> Int64:
        return np.sum([queue.removed(keep_fraction, len(state.groups)) for queue in queues], axis=0, dtype=np.int64)

    fits, too_much = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (fits + too_much) / 2
        if state.cost_of(removed(middle)) <= state.target:
            fits = middle
        else:
            too_much = middle
    state.set(removed(fits))
    queue_of = {g: queue for queue in queues for g in queue.members}

    def rank(g: int, chunk: int, cost: int) -> tuple[float, ...]:
        queue = queue_of[g]
        class_lost = sum(int(state.removed_G[member]) for member in queue.members) / queue.total
        return class_lost, _last_lost(state, g, chunk) / chunk

    state.give_back(rank)


SCOPES: dict[str, Callable[[_State], None]] = {
    "global": _global,
    "flat": _flat,
    "layer": _layer,
    "isomorphic": _isomorphic,
}
