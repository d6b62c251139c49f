"""Rules for channels: pure functions from stored statistics and weights to a saliency for each channel of each group.

Where a graph has residual blocks, each of them gets a number, too, as if it were a group of one channel.

# C = channels of a group, K = entries that one channel owns along one tensor dimension
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pipeline.models.graph import Block, Graph, Group, Member
from pipeline.saliency.reading import num_rows, statistic, weight_of
from pipeline.saliency.weight_rules import uniform

Saliency = dict[str, Tensor]
"""group name -> float64 [C], key of a block -> float64 [1]; higher = keep."""


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

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018; for coupled channels (s
    summed over all consumers before the square): Liu et al., "Group Fisher Pruning", ICML 2021.
    """
    return {name: score_C / 2 for name, score_C in _per_row(graph, statistics, "gate_square").items()}


def taylor_square(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Mean over rows of s^2: the squared first-order change. Ranks like `fisher`, which is half of it.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8.
    """
    return _per_row(graph, statistics, "gate_square")


def signed_taylor(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """|mean over rows of s|: the first-order change of the mean loss. Opposite rows cancel; s vanishes at a minimum.

    Kept for comparison. Source: the relevance -dE/d(gate) of Mozer and Smolensky, "Skeletonization", NIPS 1988, with
    the absolute value of SNIP (Lee et al., ICLR 2019).
    """
    return {name: score_C.abs() for name, score_C in _per_row(graph, statistics, "gate_sum").items()}


def group_fisher(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """`fisher` per output value that the channel costs: its activations at every contraction that writes it, for one row; for a block,
    those of all its contractions.

    Source: Liu et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021, section 3.4 (memory as the cost).
    """
    positions = {contraction.tensor: contraction.positions for contraction in graph.contractions}
    costs = {
        group.name: sum(positions.get(m.tensor, 0) * m.index_CK.shape[1] for m in group.members if m.role == "out")
        for group in graph.groups
    }
    for block in graph.blocks:
        costs[block.key] = sum(positions[name] * graph.shapes[name][0] for name in block.tensors if name in positions)
    return {name: score / max(costs[name], 1) for name, score in fisher(graph, statistics, weights, seed).items()}


def _per_row(graph: Graph, statistics: Mapping[str, Tensor], kind: str) -> Saliency:
    rows = num_rows(statistics)
    return {name: _of_group(statistics, kind, name, size) / rows for name, size in graph.scored().items()}


def _of_group(statistics: Mapping[str, Tensor], kind: str, name: str, size: int) -> Tensor:
    total_C = statistic(statistics, f"{kind}/{name}").double()
    if total_C.shape != (size,):
        raise ValueError(
            f"statistic '{kind}/{name}' has shape {list(total_C.shape)}, the group has {size} "
            "channels. It was scored on another network: score this one."
        )
    return total_C


def standard_error(graph: Graph, statistics: Mapping[str, Tensor], kind: str, kind_of_squares: str) -> Saliency:
    """Of the mean over rows of a statistic whose squares are summed, too: sqrt((E x^2 - (E x)^2) / rows)."""
    rows = num_rows(statistics)
    mean, square = _per_row(graph, statistics, kind), _per_row(graph, statistics, kind_of_squares)
    return {name: ((square[name] - mean[name].square()).clamp(min=0) / rows).sqrt() for name in mean}


# --- from activations --------------------------------------------------------------------------------------------------


def activation_mean(
    graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int
) -> Saliency:
    """|mean activation| of a channel where it is read, over rows and positions, as a multiple of the group's mean.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, section 2.2.
    """
    return {group.name: _over_mean(_moments(group, statistics)[0].abs()) for group in graph.groups}


def activation_variance(
    graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int
) -> Saliency:
    """Variance of a channel's activation where it is read, over rows and positions, as a multiple of the group's mean.

    Source: Polyak and Wolf, "Channel-Level Acceleration of Deep Face Representations", IEEE Access 2015 (inbound pruning).
    """
    return {group.name: _over_mean(_moments(group, statistics)[1]) for group in graph.groups}


def _moments(group: Group, statistics: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all entries of all its consumers; float64 [C]."""
    total_C, square_C, count = torch.zeros(group.size).double(), torch.zeros(group.size).double(), 0
    for site in group.consumers:
        key = f"{site.module}.weight"
        total_C += statistic(statistics, f"input_sum/{key}").double()[site.index_CK].sum(1)
        square_C += statistic(statistics, f"input_square/{key}").double()[site.index_CK].sum(1)
        count += int(statistic(statistics, f"input_count/{key}")) * site.index_CK.shape[1]
    mean_C = total_C / max(count, 1)
    return mean_C, (square_C / max(count, 1) - mean_C.square()).clamp(min=0)


# --- from training -----------------------------------------------------------------------------------------------------


def hard_concrete(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Probability that the channel's gate is open, from training with the method hard_concrete.

    Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018, equation 12.
    """
    return {group.name: _of_group(statistics, "gate_open", group.name, group.size) for group in graph.groups}


# --- from a rule for weights ---------------------------------------------------------------------------------------------


def summed(rule: Callable[[str, Mapping[str, Tensor], Mapping[str, Tensor], int], Tensor]) -> Callable[..., Saliency]:
    """A rule for channels from one for weights whose scores add up: the sum over all weights that a channel, or a block, owns."""

    def rule_for_channels(
        graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int
    ) -> Saliency:
        saliency = {group.name: torch.zeros(group.size, dtype=torch.float64) for group in graph.groups}
        for group in graph.groups:
            for member in group.members:
                if member.role in ("out", "in"):
                    score = rule(member.tensor, statistics, weights, seed)
                    saliency[group.name] += _entries(member, {member.tensor: score}).sum(dim=1)
        for block in graph.blocks:
            scores = [rule(name, statistics, weights, seed).sum() for name in _multiplied(graph, block)]
            saliency[block.key] = torch.stack(scores).sum().reshape(1) if scores else torch.zeros(1).double()
        return saliency

    rule_for_channels.__doc__ = rule.__doc__
    return rule_for_channels


def _multiplied(graph: Graph, block: Block) -> list[str]:
    """Weights of a block's contractions."""
    own = {*block.tensors}
    return [contraction.tensor for contraction in graph.contractions if contraction.tensor in own]


# --- from the weights alone ------------------------------------------------------------------------------------------


def magnitude_l1(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """L1 norm of all weights of a channel, where it is written and where it is read, divided by the group's mean.

    Of a block: the mean |w| of its contractions, divided by that of all blocks. Ours, since blocks of a network differ in size.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017; over all members of a group: Fang et al.,
    "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    channels = {group.name: _over_mean(_powers(group, weights, 1)) for group in graph.groups}
    return channels | _of_blocks(graph, weights, 1)


def magnitude_l2(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """L2 norm of all weights of a channel, where it is written and where it is read, divided by the group's mean.

    Of a block: the root of the mean w^2 of its contractions, divided by that of all blocks. Ours, since blocks differ in size.

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
    """
    channels = {group.name: _over_mean(_powers(group, weights, 2).sqrt()) for group in graph.groups}
    return channels | _of_blocks(graph, weights, 2)


def bn_scale(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Mean |gamma| of the norms that a channel passes through. Groups without a norm stay whole: their score is inf.

    A norm is an affine vector "X.weight" with an "X.bias" or "X.running_mean" beside it, which tells it from a PReLU.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    saliency = {}
    for group in graph.groups:
        gammas = [_entries(member, weights).abs().mean(dim=1) for member in group.members if is_norm(member, graph)]
        whole_C = torch.full((group.size,), torch.inf, dtype=torch.float64)
        saliency[group.name] = torch.stack(gammas).mean(dim=0) if gammas else whole_C
    if saliency and all(bool(score_C.isinf().all()) for score_C in saliency.values()):
        raise ValueError(
            "criterion 'bn_scale': no group passes through a norm with a scale. Choose magnitude_l2 or taylor."
        )
    return saliency


def is_norm(member: Member, graph: Graph) -> bool:
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


def _of_blocks(graph: Graph, weights: Mapping[str, Tensor], power: int) -> Saliency:
    """(mean |w|^power)^(1 / power) over the contractions of each block, as a multiple of the blocks' mean."""
    found = []
    for block in graph.blocks:
        values = [weight_of(weights, name).abs().pow(power).reshape(-1) for name in _multiplied(graph, block)]
        found.append(torch.cat(values).mean().pow(1 / power) if values else torch.zeros(()).double())
    score_B = _over_mean(torch.stack(found)) if found else torch.zeros(0)
    return {block.key: score.reshape(1) for block, score in zip(graph.blocks, score_B, strict=True)}


def _entries(member: Member, weights: Mapping[str, Tensor]) -> Tensor:
    """The entries that each channel owns; float64 [C, K * rest]."""
    along = weight_of(weights, member.tensor).movedim(member.dim, 0)
    return along[member.index_CK].reshape(len(member.index_CK), -1)


def _over_mean(score_C: Tensor) -> Tensor:
    """Score as a multiple of the group's mean; a group of zeros stays zero."""
    mean = score_C.mean()
    return score_C / mean if mean > 0 else score_C


def random(graph: Graph, statistics: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int) -> Saliency:
    """Uniform on [0, 1): the control that every criterion must beat. Only the seed and the group's name decide."""
    return {name: uniform(f"{seed}/{name}", (size,)) for name, size in graph.scored().items()}
