"""Policies and figures where ranks hold a network together (`models.sharding`): each looks at its rows only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.models.sharding import Sharded
from pipeline.training.dynamic import Masked
from pipeline.training.policy import NEAR_ZERO, MakePolicy, Shares, Training, require_agreement


def require_rows(policies: Sequence[MakePolicy], shard_over: int) -> None:
    """ValueError for a policy that needs whole weights, which ranks that hold a network together do not have."""
    for make in policies:
        kind = make.func if isinstance(make, partial) else make
        if shard_over > 1 and kind is not Masked:
            raise ValueError(
                f"{getattr(kind, '__name__', kind)} needs whole weights, and shard_over ({shard_over}) leaves each rank with some rows of "
                "them; of the policies only Masked works on rows. Train with shard_over=1, or prune without this method."
            )


def on_rows(policies: Sequence[MakePolicy], sharded: Sharded) -> list[MakePolicy]:
    """The same policies, which `require_rows` has seen, for a network in rows."""
    return [partial(MaskedRows, sharded=sharded, **make.keywords) for make in policies if isinstance(make, partial)]


class MaskedRows(Masked):
    """Masks that stay as they are, of which each rank keeps its rows."""

    def __init__(self, training: Training, *, masks: Mapping[str, Tensor], sharded: Sharded) -> None:
        require_agreement(masks, training.rank, training.world_size)
        super().__init__(training, masks={n: sharded.cut(m) if n in sharded.shapes else m for n, m in masks.items()})
        self.sharded = sharded

    def shared(self) -> Mapping[str, Tensor]:
        """Nothing: rows differ by rank, and masks that never change were compared at the start."""
        return {}

    def figures(self) -> dict[str, float]:
        kept = sum((mask.sum() for mask in self._masks.values()), torch.zeros((), device=self.sharded.device))
        numel = torch.tensor(float(sum(mask.numel() for mask in self._masks.values())), device=self.sharded.device)
        counts = torch.stack([kept.double(), numel.double()])
        dist.all_reduce(counts, group=self.sharded.group)
        return {"masked": 1 - float(counts[0] / counts[1]) if counts[1] else 0.0}


@torch.no_grad()
def shares_in_rows(sharded: Sharded, masks: Mapping[str, Tensor]) -> tuple[Shares, dict[str, Shares]]:
    """See `policy.shares_of_zeros`: of the whole network, though each rank looks at its rows of weights and `masks` only."""
    named = {name: p for name, p in sharded.rows.named_parameters() if p.dim() >= 2}
    if not named:
        return [0.0, 0.0], {}

    def size(name: str) -> Tensor:
        return named[name].abs() if name not in masks else named[name].abs().masked_fill(~masks[name], 0)

    largest = torch.stack([size(n).max() if p.numel() else p.new_zeros(()) for n, p in named.items()]).float()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=sharded.group)
    found = [
        torch.stack([(size(name) == 0).sum(), (size(name) <= NEAR_ZERO * most).sum()])
        for name, most in zip(named, largest, strict=True)
    ]
    counts = torch.stack(found)
    dist.all_reduce(counts, group=sharded.group)
    numel = {name: math.prod(sharded.shapes[name]) for name in named}
    layers = {n: [count / numel[n] for count in row] for n, row in zip(named, counts.tolist(), strict=True)}
    return [total / sum(numel.values()) for total in counts.sum(0).tolist()], layers
