"""The entries of parameters that the channels of a group own, to be measured and scaled together.

# C = channels of a group, K = entries that one channel owns along one tensor dimension, D = size of that dimension
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pipeline.models.costs import CostModel, Measure
from pipeline.models.graph import ROLES, Graph, Group
from pipeline.pruning.plan import Plan
from pipeline.saliency.channel_rules import is_norm

T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True, slots=True)
class Part:
    """One dimension of one parameter."""

    name: str
    parameter: Tensor
    dim: int
    index_CK: Tensor

    def along(self, values_C: Tensor, rest: float = 1.0) -> Tensor:
        """[1, ..., D, ..., 1]: each channel's value at its entries, `rest` at those of no channel."""
        shape = [1] * self.parameter.dim()
        shape[self.dim] = self.parameter.shape[self.dim]
        values_D = values_C.new_full((shape[self.dim],), rest)
        values_D[self.index_CK] = values_C[:, None].expand_as(self.index_CK)
        return values_D.reshape(shape)

    def summed(self, values: Tensor) -> Tensor:
        """[C]: the sum of `values`, shaped like the parameter, over each channel's entries."""
        others = [dim for dim in range(values.dim()) if dim != self.dim]
        sum_D = values.sum(dim=others) if others else values
        return sum_D[self.index_CK].sum(dim=1)


class Entries:
    """All parts of one group's channels."""

    def __init__(self, group: Group, parameters: Mapping[str, Tensor], roles: Collection[str] = ROLES) -> None:
        """Members that are no parameters (running statistics) are left out."""
        self.name, self.size = group.name, group.size
        self.parts = [
            Part(m.tensor, parameters[m.tensor], m.dim, m.index_CK.to(parameters[m.tensor].device))
            for m in group.members
            if m.role in roles and m.tensor in parameters
        ]

    @torch.no_grad()
    def norms(self) -> Tensor:
        """float32 [C]: L2 norm over all entries of each channel."""
        squares = [part.summed(part.parameter.float().square()) for part in self.parts]
        return torch.stack(squares).sum(0).sqrt()

    @torch.no_grad()
    def scale_(self, factor_C: Tensor) -> None:
        """Multiply the entries of each channel; entries of no channel stay."""
        for part in self.parts:
            part.parameter.mul_(part.along(factor_C).to(part.parameter.dtype))


def entries_of(graph: Graph, parameters: Mapping[str, Tensor], roles: Collection[str] = ROLES) -> list[Entries]:
    """Of every group that has any."""
    found = [Entries(group, parameters, roles) for group in graph.groups]
    return [entries for entries in found if entries.parts]


def norm_scales(graph: Graph, parameters: Mapping[str, T]) -> dict[str, T]:
    """Scales of the norms that channels pass through."""
    names = {member.tensor for group in graph.groups for member in group.members if is_norm(member, graph)}
    return {name: parameter for name, parameter in parameters.items() if name in names}


def removed_entries(plan: Plan, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameter -> bool like it, False for the entries of channels that the plan removes: what a cut would take away, as masks."""
    masks: dict[str, Tensor] = {}
    for group in plan.groups:
        for member in group.members:
            if member.tensor in parameters and group.removed:
                parameter = parameters[member.tensor]
                index = member.index_CK[list(group.removed)].reshape(-1).to(parameter.device)
                mask = masks.setdefault(member.tensor, torch.ones_like(parameter, dtype=torch.bool))
                mask.index_fill_(member.dim, index, False)
    return masks


Remaining = Callable[[Mapping[str, Tensor]], Tensor]
"""Group, or weight -> for each channel, or entry, the probability that it stays; -> the part that is expected to remain; differentiable."""


def remaining_cost(graph: Graph, measure: Measure) -> Remaining:
    """Of parameters or MACs: each tensor is the product of what is expected to be kept of its dimensions."""
    model = CostModel(graph)
    sizes_TD = torch.from_numpy(model.sizes_TD).double()
    factors_T = torch.from_numpy(model.factors_T[measure]).double()
    dense = factors_T @ sizes_TD.prod(1)
    touched = [
        (torch.from_numpy(r), torch.from_numpy(w).double()) for r, w in zip(model.rows, model.widths, strict=True)
    ]

    def remaining(open_by_name: Mapping[str, Tensor]) -> Tensor:
        left_TD = sizes_TD
        gated = [
            (group, where) for group, where in zip(graph.groups, touched, strict=True) if group.name in open_by_name
        ]
        kept_G = torch.stack([open_by_name[group.name].double().sum() for group, _ in gated]).cpu()  # one wait for all
        for (group, (rows, widths)), kept in zip(gated, kept_G, strict=True):
            left_TD = left_TD.index_add(0, rows, (kept - group.size) * widths)
        return factors_T @ left_TD.clamp(min=0).prod(1) / dense

    return remaining
