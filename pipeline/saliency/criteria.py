"""Criteria: pure rules that turn stored statistics and weights into a saliency for each channel of each group.

# C = channels of a group, K = entries that one channel owns along one tensor dimension

One scoring pass serves every criterion. Loss-based scores are all in units of the loss, so groups may compete
("global"). Scores of weights alone are not: a layer with large weights is no more important than one with small
weights behind a norm. There every layer keeps the same fraction by default ("layer"), which also protects against
emptying one layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.models.graph import Graph, Group, Member

Saliency = dict[str, Tensor]
"""group name -> float64 [C]; higher = keep."""
Rule = Callable[[Graph, Mapping[str, Tensor], Mapping[str, Tensor], int], Saliency]


@dataclass(frozen=True, slots=True)
class Criterion:
    """A rule and what it needs."""

    fn: Rule
    """fn(graph, statistics, weights, seed) -> saliency. `weights` is the state_dict of the dense network."""
    needs: tuple[str, ...]
    """Kinds of statistics, the part of their keys before "/"; empty: weights alone, no scoring pass."""
    scope: str
    """How groups compete unless a run says otherwise: a name in pruning.allocation.SCOPES."""


def find(name: str) -> Criterion:
    """The criterion of this name; an unknown name lists the known ones."""
    if name not in CRITERIA:
        raise ValueError(f"criterion {name!r} is unknown; known criteria: {', '.join(sorted(CRITERIA))}.")
    return CRITERIA[name]


# --- from the loss ---------------------------------------------------------------------------------------------------


def taylor(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Mean over rows of |s|: how much the loss of a row changes, to first order, when the channel is cut.

    The absolute value is taken per row, since gains of some rows do not make up for losses of others.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017
    (absolute value per example); gates as the place of s: Molchanov et al., "Importance Estimation for Neural Network
    Pruning", CVPR 2019.
    """
    return _per_row(graph, statistics, "gate_abs")


def fisher(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Half the mean over rows of s^2: the second-order rise of the loss, with the empirical Fisher as curvature.

    The squared Taylor form of Molchanov et al. (CVPR 2019) taken per row is twice this, and ranks alike.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; for coupled channels (s
    summed over all consumers before the square): Liu et al., "Group Fisher Pruning", ICML 2021.
    """
    return {name: score_C / 2 for name, score_C in _per_row(graph, statistics, "gate_square").items()}


def signed_taylor(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """|mean over rows of s|: the first-order change of the mean loss. Opposite rows cancel; s vanishes at a minimum.

    Kept for comparison. Source: the relevance -dE/d(gate) of Mozer and Smolensky, "Skeletonization", NIPS 1988, with
    the absolute value of SNIP (Lee et al., ICLR 2019).
    """
    return {name: score_C.abs() for name, score_C in _per_row(graph, statistics, "gate_sum").items()}


def _per_row(graph: Graph, statistics: Mapping[str, Tensor], kind: str) -> Saliency:
    rows = int(_statistic(statistics, "rows"))
    if rows < 1:
        raise ValueError("statistic 'rows' is 0: nothing was scored. Give score.num_rows at least one row.")
    saliency = {}
    for group in graph.groups:
        total_C = _statistic(statistics, f"{kind}/{group.name}").double()
        if total_C.shape != (group.size,):
            raise ValueError(
                f"statistic '{kind}/{group.name}' has shape {list(total_C.shape)}, the group has {group.size} "
                "channels. It was scored on another network: score this one."
            )
        saliency[group.name] = total_C / rows
    return saliency


def _statistic(statistics: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in statistics:
        kinds = sorted({name.split("/")[0] for name in statistics})
        data_free = ", ".join(name for name, criterion in CRITERIA.items() if not criterion.needs)
        raise ValueError(
            f"statistic {key!r} is missing; the stored kinds are: {', '.join(kinds) or 'none'}. Run the scoring pass "
            f"on this network, or choose a criterion that needs no statistics: {data_free}."
        )
    return statistics[key]


# --- from the weights alone ------------------------------------------------------------------------------------------


def magnitude_l1(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """L1 norm of all weights of a channel, where it is written and where it is read, divided by the group's mean.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; over all members of a group: Fang et al.,
    "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    return {group.name: _over_mean(_powers(group, weights, 1)) for group in graph.groups}


def magnitude_l2(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """L2 norm of all weights of a channel, where it is written and where it is read, divided by the group's mean.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    return {group.name: _over_mean(_powers(group, weights, 2).sqrt()) for group in graph.groups}


def bn_scale(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Mean |gamma| of the norms that a channel passes through. Groups without a norm stay whole: their score is inf.

    A norm is an affine vector "X.weight" with an "X.bias" or "X.running_mean" beside it, which tells it from a PReLU.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    saliency = {}
    for group in graph.groups:
        gammas = [_entries(member, weights).abs().mean(dim=1) for member in group.members if _is_norm(member, graph)]
        whole_C = torch.full((group.size,), torch.inf, dtype=torch.float64)
        saliency[group.name] = torch.stack(gammas).mean(dim=0) if gammas else whole_C
    if saliency and all(bool(score_C.isinf().all()) for score_C in saliency.values()):
        raise ValueError(
            "criterion 'bn_scale': no group passes through a norm with a scale. Choose magnitude_l2 or taylor."
        )
    return saliency


def _is_norm(member: Member, graph: Graph) -> bool:
    owner, _, leaf = member.tensor.rpartition(".")
    siblings = (f"{owner}.bias", f"{owner}.running_mean")
    is_vector = len(graph.shapes[member.tensor]) == 1
    return member.role == "affine" and leaf == "weight" and is_vector and any(name in graph.shapes for name in siblings)


def _powers(group: Group, weights: Mapping[str, Tensor], power: int) -> Tensor:
    """Sum of |w|^power over the contraction weights that a channel owns; float64 [C]."""
    total_C = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        if member.role in ("out", "in"):
            total_C += _entries(member, weights).abs().pow(power).sum(dim=1)
    return total_C


def _entries(member: Member, weights: Mapping[str, Tensor]) -> Tensor:
    """The entries that each channel owns; float64 [C, K * rest]."""
    if member.tensor not in weights:
        raise ValueError(f"weights lack {member.tensor}; pass the state_dict of the network that was traced.")
    along = weights[member.tensor].detach().cpu().double().movedim(member.dim, 0)
    return along[member.index_CK].reshape(len(member.index_CK), -1)


def _over_mean(score_C: Tensor) -> Tensor:
    """Score as a multiple of the group's mean; a group of zeros stays zero."""
    mean = score_C.mean()
    return score_C / mean if mean > 0 else score_C


def random(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Uniform on [0, 1): the control that every criterion must beat. Only the seed and the group's name decide."""
    saliency = {}
    for group in graph.groups:
        digest = hashlib.sha256(f"{seed}/{group.name}".encode()).digest()
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))
        saliency[group.name] = torch.from_numpy(generator.random(group.size))
    return saliency


CRITERIA: dict[str, Criterion] = {
    "taylor": Criterion(taylor, ("gate_abs", "rows"), "global"),
    "fisher": Criterion(fisher, ("gate_square", "rows"), "global"),
    "signed_taylor": Criterion(signed_taylor, ("gate_sum", "rows"), "global"),
    "magnitude": Criterion(magnitude_l2, (), "layer"),
    "magnitude_l1": Criterion(magnitude_l1, (), "layer"),
    "magnitude_l2": Criterion(magnitude_l2, (), "layer"),
    "bn_scale": Criterion(bn_scale, (), "layer"),
    "random": Criterion(random, (), "layer"),
}
