"""Penalties: what is done to weights after each update, so that some of them, or whole channels, go to zero.

# C = channels of a group

A penalty acts after the optimizer with the learning rate of the update, not through the loss: the step is then exact for any
optimizer (momentum and Adam's scaling do not touch it), and a proximal step reaches zeros that are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.costs import Measure
from pipeline.models.graph import Graph
from pipeline.pruning.masks import channel_masks, mask_
from pipeline.pruning.plan import Plan
from pipeline.saliency.channel_rules import Saliency, magnitude_l2
from pipeline.training.entries import entries_of, norm_scales, remaining_cost
from pipeline.training.policy import Policy, Training, agreed

PlanOf = Callable[[Saliency], Plan]
"""Which channels stay within the run's budget, by a saliency."""


# --- the steps --------------------------------------------------------------------------------------------------------


def sign_step(weight: Tensor, amount: float) -> Tensor:
    """w - amount * sign(w): the plain subgradient step of L1. It passes over zero and swings around it by up to `amount`."""
    return weight - amount * weight.sign()


def soft_threshold(weight: Tensor, amount: float) -> Tensor:
    """sign(w) * max(|w| - amount, 0): the proximal step of L1, which ends at exact zeros.

    Source: Daubechies, Defrise, De Mol, "An iterative thresholding algorithm" (ISTA), 2004; Beck and Teboulle 2009.
    """
    return weight.sign() * (weight.abs() - amount).clamp(min=0)


def group_factor(norm_C: Tensor, amount: float | Tensor) -> Tensor:
    """max(0, 1 - amount / ||w_g||) of each channel's norm: the proximal step of the group lasso scales the channel by it.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006; over all members
    of a group: Fang et al., "DepGraph", CVPR 2023.
    """
    return (1 - amount / norm_C.clamp(min=torch.finfo(norm_C.dtype).tiny)).clamp(min=0)


def adaptive_share(norm_C: Tensor, least: Tensor, largest: Tensor) -> Tensor:
    """2^(-4 (||w_g|| - least) / (largest - least)): 1 for the least norm, 1/16 for the largest.

    A penalty that is the same for all takes as much from the channels that will stay, and a network whose norms are alike is shrunk as a
    whole before the first channel is gone.

    Source: Fang et al., "DepGraph", CVPR 2023, equation 5, by the norm in place of their importance.
    """
    return torch.exp2(-4 * (norm_C - least) / (largest - least).clamp(min=torch.finfo(norm_C.dtype).tiny))


def l0_sign_step(weight: Tensor, grad: Tensor, amount: float) -> Tensor:
    """w - amount * sign(w * sign(g)): the text-book's rule for L0, as it is written.

    What it does: |w| shrinks by `amount` where g > 0 and grows where g < 0, whatever the sign of w. Among positive weights those
    that agree with the sign of their gradient shrink, and the step is one of sign descent; among negative ones it is one of ascent.
    No weight is held at zero: near zero it swings by `amount`. Kept for comparison; `hard_concrete` is the L0 penalty that works.
    """
    return weight - amount * (weight * grad.sign()).sign()


class Penalty(Policy):
    """Shrinks after each update, until what is zero meets the aim. From then on zeros stay, and the rest is free.

    Strength is without a unit, so that one number serves short and long trainings, large and small weights: where the loss is not in its way,
    strength 1 takes from each weight, over the whole training, as much as the average one has at its beginning. Each update takes a
    part of that in proportion to its learning rate.

    Whether the aim is met is looked at after shrinking, since momentum moves a weight from zero with each update.
    """

    def __init__(self, training: Training, strength: float, aim: float) -> None:
        self.rate, self.aim = strength / training.lr_sum, aim
        self.held: dict[str, Tensor] = {}
        """Once the aim is met: by name, what is not zero."""

    @property
    def rests(self) -> bool:
        return bool(self.held)

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        if self.rests:
            self.hold_()
            return
        self.shrink_(lr * self.rate)
        if self.aim and self.remaining() <= self.aim:
            self.held = {name: size > 0 for name, size in self.sizes().items()}

    def remaining(self) -> float:
        """The part, of what the aim is a part of, that is not zero."""
        return 1.0

    def sizes(self) -> dict[str, Tensor]:
        """Of all that may go to zero, by name."""
        return {}

    def shrink_(self, amount: float) -> None:
        """By `amount` times the average size at the beginning."""
        raise NotImplementedError

    def hold_(self) -> None:
        """Zero again what was zero when the aim was met."""

    def figures(self) -> dict[str, float]:
        return {"remains": self.remaining(), "aim": self.aim} if self.aim else {}

    def shared(self) -> Mapping[str, Tensor]:
        return self.held

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sizes = self.sizes() if state["held"] else {}  # they know the device
        self.held = {name: held.to(sizes[name].device) for name, held in state["held"].items()}


# --- on weights -------------------------------------------------------------------------------------------------------


class _OnWeights(Penalty):
    """On each of the named weights; the aim is the fraction of them that stays, 0 for none."""

    def __init__(self, training: Training, *, names: Sequence[str], strength: float, keep: float = 0.0) -> None:
        super().__init__(training, strength, keep)
        self.weights = {name: training.parameters[name] for name in names}
        sizes = [weight.detach().abs().sum(dtype=torch.float64) for weight in self.weights.values()]
        self.average = float(sum(sizes)) / sum(weight.numel() for weight in self.weights.values())

    def shrink_(self, amount: float) -> None:
        for weight in self.weights.values():
            weight.copy_(self.stepped(weight, amount * self.average))

    def stepped(self, weight: nn.Parameter, amount: float) -> Tensor:
        raise NotImplementedError


class L1Sign(_OnWeights):
    """`sign_step` on weights. It leaves no zeros, so it never rests."""

    def stepped(self, weight: nn.Parameter, amount: float) -> Tensor:
        return sign_step(weight, amount)


class L0Sign(_OnWeights):
    """`l0_sign_step` on weights, with the gradients of the update before. It leaves no zeros, so it never rests."""

    def stepped(self, weight: nn.Parameter, amount: float) -> Tensor:
        return weight if weight.grad is None else l0_sign_step(weight, weight.grad, amount)


class L1Prox(_OnWeights):
    """`soft_threshold` on weights."""

    def stepped(self, weight: nn.Parameter, amount: float) -> Tensor:
        return soft_threshold(weight, amount)

    def remaining(self) -> float:
        kept = torch.stack([(weight != 0).sum() for weight in self.weights.values()]).sum()
        return float(kept) / sum(weight.numel() for weight in self.weights.values())

    def sizes(self) -> dict[str, Tensor]:
        return {name: weight.detach().abs() for name, weight in self.weights.items()}

    def hold_(self) -> None:
        for name, weight in self.weights.items():
            weight.mul_(self.held[name])

    def settle_(self, model: nn.Module) -> None:
        zero_where_zero_(model, self.weights)


def zero_where_zero_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Averaged weights approach a zero and never reach it: they get those of the trained weights."""
    mask_(dict(model.named_parameters()), {name: weight != 0 for name, weight in weights.items()})


# --- on channels ------------------------------------------------------------------------------------------------------


class _OnChannels(Penalty):
    """On the channels of every group; the aim is the fraction of parameters or MACs that remains without the empty ones.

    The largest `min_keep` of each group, which no plan would remove, are left alone.
    """

    def __init__(
        self,
        training: Training,
        *,
        graph: Graph,
        touched: Mapping[str, Tensor],
        strength: float,
        measure: Measure = "params",
        fraction: float = 0.0,
        min_keep: float = 0.1,
    ) -> None:
        super().__init__(training, strength, fraction)
        self.cost = remaining_cost(graph, measure)
        self.groups = entries_of(graph, touched)
        self.averages: list[float] = []
        """Of each group, what `shrink_` takes multiples of."""
        self.min_keep = min_keep

    def remaining(self) -> float:
        return float(self.cost({name: (size_C > 0).float() for name, size_C in self.sizes().items()}))

    def sizes(self) -> dict[str, Tensor]:
        """Group -> [C], 0 for channels that are empty."""
        return {entries.name: entries.norms() for entries in self.groups}

    def shrink_(self, amount: float) -> None:
        norms = [entries.norms() for entries in self.groups]
        for entries, average, norm_C, share_C in zip(
            self.groups, self.averages, norms, self.shares(norms), strict=True
        ):
            factor_C = group_factor(norm_C, amount * average * share_C)
            factor_C[norm_C.topk(math.ceil(self.min_keep * entries.size)).indices] = 1
            entries.scale_(factor_C)

    def shares(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """[C] each: the part of the penalty that a channel feels, by its place between the least and the largest norm of its group."""
        return [adaptive_share(norm_C, norm_C.min(), norm_C.max()) for norm_C in norms]

    def hold_(self) -> None:
        for entries in self.groups:
            entries.scale_(self.held[entries.name].float())

    def settle_(self, model: nn.Module) -> None:
        zero_where_zero_(model, {part.name: part.parameter for entries in self.groups for part in entries.parts})


class GroupLasso(_OnChannels):
    """`group_factor` on every channel of every group: all its entries, where it is written, where it is read, and in norms.

    The norm that is taken away is a multiple of the group's average, so that wide and narrow groups, and those of small and of
    large weights, feel the same.
    """

    def __init__(self, training: Training, *, graph: Graph, **options: Any) -> None:
        super().__init__(training, graph=graph, touched=training.parameters, **options)
        self.averages = [float(entries.norms().mean()) for entries in self.groups]


class BnSlimming(_OnChannels):
    """`group_factor` on the scales of norms that a channel passes through, and on nothing else; one threshold for all groups.

    Of one norm that is `soft_threshold`. Those of a residual stream go to zero together: a channel is not gone before its last scale is,
    and the scales of branches, which begin at zero in some networks, would otherwise take whole branches with them.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017; a proximal step in place
    of their subgradient.
    """

    def __init__(self, training: Training, *, graph: Graph, **options: Any) -> None:
        scales = norm_scales(graph, training.parameters)
        if not scales:
            raise ValueError("bn_slimming: no group passes through a norm with a scale. Choose group_lasso.")
        super().__init__(training, graph=graph, touched=scales, **options)
        average = float(torch.cat([entries.norms() for entries in self.groups]).mean())
        self.averages = [average] * len(self.groups)

    def shares(self, norms: Sequence[Tensor]) -> list[Tensor]:
        least, largest = torch.cat([*norms]).aminmax()
        return [adaptive_share(norm_C, least, largest) for norm_C in norms]


class Growing(Policy):
    """Weight decay that rises step by step on the channels marked for removal, until they have nothing left to give.

    Marked are the channels of least L2 norm at the beginning, as many as the budget asks for. Their decay is in proportion to k after k
    intervals, applied as w * (1 - min(1, lr * decay)). Strength is without a unit: at a constant rate, and without the loss in its way, a
    marked weight falls to about exp(-strength) of itself.

    Source: Wang, Qin, Zhang, Fu, "Neural Pruning via Growing Regularization" (GReg-1), ICLR 2021.
    """

    def __init__(
        self, training: Training, *, graph: Graph, strength: float, plan_of: PlanOf, every: int, settled_after: float
    ) -> None:
        def marks() -> dict[str, Tensor]:
            weights = {name: p.detach() for name, p in training.parameters.items()}
            return channel_masks(plan_of(magnitude_l2(graph, {}, weights, 0)))

        self.groups = entries_of(graph, training.parameters)
        self.kept = agreed(marks, training)
        self.every, self.last_rise = every, round(settled_after * training.num_steps)
        intervals = [self._interval(step) for step in range(training.num_steps)]
        self.rate = strength / training.lr_sum * len(intervals) / sum(intervals)

    def _interval(self, step: int) -> int:
        """1, 2 ..., until the decay no longer rises."""
        return min(step, self.last_rise) // self.every + 1

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        decay = self.rate * self._interval(step)
        for entries in self.groups:
            kept_C = self.kept[entries.name].to(torch.float32)
            entries.scale_(kept_C + (1 - kept_C) * (1 - min(1.0, lr * decay)))

    def shared(self) -> Mapping[str, Tensor]:
        return self.kept

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.kept = {name: mask.to(self.kept[name].device) for name, mask in state["kept"].items()}

    def figures(self) -> dict[str, float]:
        marked = torch.cat([entries.norms()[~self.kept[entries.name]] for entries in self.groups])
        return {"largest_norm_of_marked": float(marked.max()) if len(marked) else 0.0}
