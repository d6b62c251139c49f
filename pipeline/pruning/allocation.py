"""Allocation: how many channels each group keeps, so that a budget is met and the least saliency is lost.

# C = channels of a group, G = groups, B = residual blocks, T = tensors, D = dimensions of a tensor

Channels go in chunks: `round_to` at a time in groups of more than 32 (hardware likes round widths), one at a time in
smaller ones. Each scope fixes an order in which chunks go; all then end alike: the first state within the budget is
found, and what the last step took too much is given back. Costs are always those of the current state, since the cost
of a layer depends on both of its sides.

Residual blocks go whole, up to a given part of them. In the global scope they stand in the same queue as the chunks of
channels; in the others, where saliency is not divided by costs, the least salient go before all channels. A block that saves
more than is left to save stays, so that the budget is met as closely as by channels alone; it goes only where those do not
suffice. A block's saliency is that of the dense network, also when channels inside have gone already: what is left of it
saves less, so its price rises.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models.costs import CostModel, count
from pipeline.models.graph import Graph, Group
from pipeline.pruning.plan import Budget, Plan, planned

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

Rank = Callable[[int, int, int], tuple[float, ...]]
BlockRank = Callable[[int, int], tuple[float, ...]]

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
    max_blocks: float = 0.0,
    dense: Graph | None = None,
) -> Plan:
    """Choose the channels that stay, and the residual blocks that go.

    Args:
        graph: channel groups of the network to be cut.
        saliency: group name -> [C], higher = keep. +inf keeps a channel in any case. Of equals the first index stays;
            of equally good chunks the one of the first group name goes. Key of a block -> [1]; not read if none may go.
        budget: what must remain.
        criterion: recorded in the plan, not used.
        scope: a name in SCOPES: how groups compete.
        min_keep: fraction of each group that stays in any case; at least one channel, rounded up to `round_to`.
        round_to: groups of more than 32 channels keep a multiple of this, or all; a finer step is taken only if the
            target would be missed by more than 0.5 % without.
        max_blocks: largest fraction of the graph's blocks that may go, rounded down; 0 keeps all.
        dense: of the network that all these fractions, and sizes of groups, refer to, where `graph` is what earlier cuts have
            left of it; None: `graph` itself.

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
    if not 0 <= max_blocks <= 1:
        raise ValueError(
            f"max_blocks ({max_blocks}) must lie between 0 and 1: the largest fraction of blocks that may go."
        )
    ranked = _ranked(graph, saliency)
    dense = graph if dense is None else dense
    gone = sum(block.tensors[0] not in graph.shapes for block in dense.blocks)
    most = math.floor(Fraction(repr(max_blocks)) * len(dense.blocks)) - gone
    block_saliency = _block_saliency(graph, saliency) if most > 0 else []
    state = _State(graph, dense, ranked, block_saliency, budget, min_keep, round_to, most)
    order(state)
    kept = {group.name: np.sort(ranked[g].order[state.removed_G[g] :]) for g, group in enumerate(graph.groups)}
    return planned(
        graph,
        {name: torch.from_numpy(k) for name, k in kept.items()},
        removed_blocks=[graph.blocks[b].name for b in sorted(state.removed_blocks)],
        budget=budget,
        criterion=criterion,
        scope=scope,
        dense=count(dense, {}),
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
    names = graph.scored().keys()
    if unknown := sorted(set(saliency) - names):
        raise ValueError(
            f"saliency names groups that the graph lacks: {', '.join(unknown[:5])}. Score and trace the same network."
        )
    return [_rank(_checked(group.name, group.size, saliency.get(group.name))) for group in graph.groups]


def _rank(score_C: Float64) -> _Ranked:
    order = np.lexsort((-np.arange(len(score_C)), score_C))
    return _Ranked(order, score_C[order].tolist(), int(np.isfinite(score_C).sum()))


def _block_saliency(graph: Graph, saliency: Mapping[str, Tensor]) -> list[float]:
    """[B]"""
    return [float(_checked(block.key, 1, saliency.get(block.key))[0]) for block in graph.blocks]


def _checked(name: str, size: int, score: Tensor | None) -> Float64:
    if score is None:
        raise ValueError(f"saliency lacks group {name}. Score it, or freeze it with Graph.without.")
    score_C: Float64 = score.detach().double().cpu().numpy()
    if score_C.shape != (size,):
        raise ValueError(f"saliency of group {name} has shape {list(score_C.shape)}, the group has {size} channels.")
    if not (score_C > -np.inf).all():
        worst = int(np.flatnonzero(~(score_C > -np.inf))[0])
        raise ValueError(
            f"saliency of group {name} is {score_C[worst]} at channel {worst}. The network or its loss gave no "
            "number there: look at the statistics of this group, or freeze it with Graph.without."
        )
    return score_C


class _State:
    """How many channels each group has lost, which blocks are gone, and what that saves in the budget's measure."""

    def __init__(
        self,
        graph: Graph,
        dense: Graph,
        ranked: Sequence[_Ranked],
        block_saliency: Sequence[float],
        budget: Budget,
        min_keep: float,
        round_to: int,
        most_blocks: int,
    ) -> None:
        self.groups = graph.groups
        self.blocks = graph.blocks
        self.block_saliency = block_saliency
        self.most_blocks = most_blocks
        self.removed_blocks: set[int] = set()
        by_name = {group.name: group for group in dense.groups}
        self.dense_groups = [by_name.get(group.name, group) for group in graph.groups]
        """As they were before any cut: floors, chunks and structures are those of the dense network."""
        self.dense_shapes = dense.shapes
        self.ranked = ranked
        self.budget = budget
        self.model = CostModel(graph)
        self.factors_T = self.model.factors_T[budget.measure].copy()
        """What an entry of each tensor costs; nothing in blocks that are gone."""
        self.min_keep, self.round_to = min_keep, round_to
        dense_size_G = [group.size for group in self.dense_groups]
        self.unit_G = [round_to if size > max(SMALL_GROUP, round_to) else 1 for size in dense_size_G]
        # 0.1 * 30 is a little more than 3; that a floor is rounded up to the unit follows from whole chunks.
        floor_G = [max(1, math.ceil(min_keep * size - 1e-9)) for size in dense_size_G]
        self.limit_G = np.array(
            [
                min(max(group.size - floor, 0), r.num_free)
                for group, floor, r in zip(graph.groups, floor_G, ranked, strict=True)
            ],
            dtype=np.int64,
        )
        """Most channels that a group can lose."""
        self.dense = count(dense, {})[budget.measure]
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

    # --- blocks

    def may_go(self, b: int) -> bool:
        room = len(self.removed_blocks) < self.most_blocks
        return room and b not in self.removed_blocks and math.isfinite(self.block_saliency[b])

    def block_cost(self, b: int) -> int:
        """What block b costs, or would cost again."""
        rows = self.model.block_rows[b]
        dense = self.model.factors_T[self.budget.measure]
        return int(dense[rows] @ self.sizes_TD[rows].prod(axis=1))

    def remove_block(self, b: int) -> None:
        self.cost -= self.block_cost(b)
        self.removed_blocks.add(b)
        self.factors_T[self.model.block_rows[b]] = 0

    def inside_blocks(self) -> frozenset[int]:
        """Groups that are gone with their blocks."""
        gone = {t for b in self.removed_blocks for t in self.model.block_rows[b].tolist()}
        return frozenset(g for g, rows in enumerate(self.model.rows) if gone and gone.issuperset(rows.tolist()))

    def give_back_block(self, b: int) -> None:
        self.cost += self.block_cost(b)
        self.removed_blocks.remove(b)
        rows = self.model.block_rows[b]
        self.factors_T[rows] = self.model.factors_T[self.budget.measure][rows]

    # --- chunks of channels

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

    def check_reachable(self) -> None:
        """Raise ValueError if the target lies below what the floors and the blocks that are there leave."""
        least = self.least()
        if least > self.target:
            measure, fraction = self.budget.measure, self.budget.fraction
            reachable = math.ceil(10_000 * Fraction(least, self.dense)) / 10_000  # up: this fraction can be asked for
            way_out = f"Ask for {measure}={reachable:.4f} or more, lower" if reachable < 1 else "Lower"
            more = " raise max_blocks," if len(self.removed_blocks) < len(self.blocks) else ""
            raise ValueError(
                f"budget {measure}={fraction} asks for {self.target:,} of {self.dense:,} {measure}, but at least "
                f"{least:,} remain: the smallest reachable fraction is {reachable:.4f}. {way_out} min_keep "
                f"(now {self.min_keep}) or round_to (now {self.round_to}),{more} or see in graph.frozen what stays whole."
            )

    def least(self) -> int:
        """What the network costs with every group at its floor."""
        return self.cost_of(np.array([self._floor_removed(g) for g in range(len(self.groups))], dtype=np.int64))

    def _floor_removed(self, g: int) -> int:
        removed = 0
        while chunk := self.next_chunk(g, removed):
            removed += chunk
        return removed

    def give_back(self, rank: Rank, rank_block: BlockRank) -> None:
        """Give back last chunks and blocks, best first, until none fits under the target; if that is coarse, single channels.

        rank(g, chunk, cost) and rank_block(b, cost) order the candidates: the largest first; of equals the first name.
        """
        self._give_back(self.last_chunk, rank, rank_block)
        if self.target - self.cost > FINE_STEP_ABOVE * self.target:
            self._give_back(lambda g: min(1, int(self.removed_G[g])), rank, rank_block)

    def _give_back(self, chunk_of: Callable[[int], int], rank: Rank, rank_block: BlockRank) -> None:
        while self.cost < self.target:
            found: list[tuple[bool, tuple[float, ...], str, Callable[[], None]]] = []
            for g, group in enumerate(self.groups):
                if chunk := chunk_of(g):
                    cost = self.delta(g, -chunk)
                    if 0 < cost <= self.target - self.cost:
                        # A group that already left its multiples is filled first, so that few groups end up odd.
                        odd = (group.size - int(self.removed_G[g])) % self.unit_G[g] != 0
                        key = tuple(-value for value in rank(g, chunk, cost))
                        found.append((not odd, key, group.name, partial(self.remove, g, -chunk, cost)))
            for b in self.removed_blocks:
                if (cost := self.block_cost(b)) <= self.target - self.cost:
                    key = tuple(-value for value in rank_block(b, cost))
                    found.append((True, key, self.blocks[b].key, partial(self.give_back_block, b)))
            if not found:
                return
            min(found, key=lambda one: one[:3])[3]()


# --- scopes ----------------------------------------------------------------------------------------------------------


def _global(state: _State) -> None:
    """All groups and blocks compete: the chunk, or the block, with the least saliency per unit of cost goes first.

    A heap that is corrected lazily: what a chunk costs only falls while others go, so a key only rises, and the
    smallest key that is up to date is the smallest of all. Blocks are numbered after the groups.
    """
    heap: list[tuple[float, str, int, int, int, int]] = []
    neighbours, first_block = _neighbours(state.model), len(state.groups)
    changes = np.zeros(len(neighbours), dtype=np.int64)
    too_much: list[int] = []

    def push(g: int) -> None:
        removed = int(state.removed_G[g])
        if (chunk := state.next_chunk(g, removed)) and (saving := -state.delta(g, chunk)):
            key = _price(state.lost(g, removed, removed + chunk), saving)
            heapq.heappush(heap, (key, state.groups[g].name, g, int(changes[g]), chunk, saving))

    def push_block(b: int) -> None:
        if state.may_go(b) and (saving := state.block_cost(b)):
            key, i = _price(state.block_saliency[b], saving), first_block + b
            heapq.heappush(heap, (key, state.blocks[b].key, i, int(changes[i]), 1, saving))

    for g in range(len(state.groups)):
        push(g)
    for b in range(len(state.block_saliency)):
        push_block(b)
    while state.cost > state.target:
        if not heap:  # every group is at its floor
            if not (late := [b for b in too_much if state.may_go(b)]):
                state.check_reachable()
            state.remove_block(late[0])
            continue
        _, _, i, stamp, chunk, saving = heapq.heappop(heap)
        if i < first_block:
            if stamp == changes[i]:
                state.remove(i, chunk, -saving)
                changes[neighbours[i]] += 1
            push(i)
        elif stamp != changes[i]:
            push_block(i - first_block)
        elif state.cost - saving < state.target:
            too_much.append(i - first_block)
        elif state.may_go(i - first_block):
            state.remove_block(i - first_block)
            changes[neighbours[i]] += 1
    state.give_back(
        lambda g, chunk, cost: (_price(_last_lost(state, g, chunk), cost),),
        lambda b, cost: (_price(state.block_saliency[b], cost),),
    )


def _price(lost: float, saving: int) -> float:
    """Saliency per unit of cost. Below zero, where loss helps, go first those that save most."""
    return lost / saving if lost >= 0 else lost * saving


def _last_lost(state: _State, g: int, chunk: int) -> float:
    removed = int(state.removed_G[g])
    return state.lost(g, removed - chunk, removed)


def _neighbours(model: CostModel) -> list[Int64]:
    """Groups, and after them blocks, whose costs depend on group g, then on block b: they share a tensor with it; it is among them."""
    sharing: dict[int, list[int]] = {}
    all_rows = [*model.rows, *model.block_rows]
    for i, rows in enumerate(all_rows):
        for t in rows.tolist():
            sharing.setdefault(t, []).append(i)
    return [
        np.array(sorted({other for t in rows.tolist() for other in sharing[t]}), dtype=np.int64) for rows in all_rows
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
    for g, group in enumerate(state.dense_groups):
        classes.setdefault(_structure(group, state.dense_shapes), []).append(g)
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
    """The largest fraction that fits, the same for every class; what rounding left goes to classes that lost most.

    Blocks go before, the least salient first, until one saves more than is left to save.
    """
    for b in sorted(range(len(state.block_saliency)), key=lambda b: (state.block_saliency[b], state.blocks[b].key)):
        spared = state.cost - state.block_cost(b) < state.target and state.least() <= state.target
        if spared or not state.may_go(b):
            break
        state.remove_block(b)
    state.check_reachable()
    gone = state.inside_blocks()
    classes = [[g for g in members if g not in gone] for members in classes]
    queues = [_Queue.of(state, members) for members in classes if members]

    def removed(keep_fraction: float) -> Int64:
        removed_G = np.zeros(len(state.groups), dtype=np.int64)
        for queue in queues:
            removed_G += queue.removed(keep_fraction, len(state.groups))
        return removed_G

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

    state.give_back(rank, lambda b, cost: (-math.inf,))


SCOPES: dict[str, Callable[[_State], None]] = {
    "global": _global,
    "flat": _flat,
    "layer": _layer,
    "isomorphic": _isomorphic,
}
