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


def group_factor(norm_C: Tensor, amount: float) -> Tensor:
    """max(0, 1 - amount / ||w_g||) of each channel's norm: the proximal step of the group lasso scales the channel by it.

    Source: Yuan and Lin, "Model selection and estimation in regression with grouped variables", 2006; over all members
    of a group: Fang et al., "DepGraph", CVPR 2023.
    """
    return (1 - amount / norm_C.clamp(min=torch.finfo(norm_C.dtype).tiny)).clamp(min=0)


def l0_sign_step(weight: Tensor, grad: Tensor, amount: float) -> Tensor:
    """w - amount * sign(w * sign(g)): the text-book's rule for L0, as it is written.

    What it does: |w| shrinks by `amount` where g > 0 and grows where g < 0, whatever the sign of w. Among positive weights those
    that agree with the sign of their gradient shrink, and the step is one of sign descent; among negative ones it is one of ascent.
    No weight is held at zero: near zero it swings by `amount`. Kept for comparison; `hard_concrete` is the L0 penalty that works.
    """
    return weight - amount * (weight * grad.sign()).sign()


class Penalty(Policy):
    """Shrinks by learning rate * strength after each update, until what is zero meets the aim. From then on zeros stay, and the rest is free.

    Without the loss in its way a weight shrinks by strength times the sum of the learning rates. Whether the aim is met is looked at
    every `every` steps, since the answer comes from the device; and after shrinking, since momentum moves a weight from zero with each update.
    """

    def __init__(self, strength: float, aim: float, every: int) -> None:
        self.strength, self.aim, self.every = strength, aim, every
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
        self.shrink_(lr * self.strength)
        if self.aim and step % self.every == 0 and self.remaining() <= self.aim:
            self.held = {name: size > 0 for name, size in self.sizes().items()}

    def remaining(self) -> float:
        """The part, of what the aim is a part of, that is not zero."""
        return 1.0

    def sizes(self) -> dict[str, Tensor]:
        """Of all that may go to zero, by name."""
        return {}

    def shrink_(self, amount: float) -> None:
        raise NotImplementedError

    def hold_(self) -> None:
        """Zero again what was zero when the aim was met."""

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

    def __init__(
        self, training: Training, *, names: Sequence[str], strength: float, keep: float = 0.0, every: int = 20
    ) -> None:
        super().__init__(strength, keep, every)
        self.weights = {name: training.parameters[name] for name in names}

    def shrink_(self, amount: float) -> None:
        for weight in self.weights.values():
            weight.copy_(self.stepped(weight, amount))

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
    """On the channels of every group; the aim is the fraction of parameters or MACs that remains without the empty ones."""

    def __init__(
        self,
        training: Training,
        *,
        graph: Graph,
        touched: Mapping[str, Tensor],
        strength: float,
        measure: Measure = "params",
        fraction: float = 0.0,
        every: int = 20,
    ) -> None:
        super().__init__(strength, fraction, every)
        self.cost = remaining_cost(graph, measure)
        self.groups = entries_of(graph, touched)

    def remaining(self) -> float:
        return float(self.cost({name: (size_C > 0).float() for name, size_C in self.sizes().items()}))

    def sizes(self) -> dict[str, Tensor]:
        """Group -> [C], 0 for channels that are empty."""
        return {entries.name: entries.norms() for entries in self.groups}

    def hold_(self) -> None:
        for entries in self.groups:
            entries.scale_(self.held[entries.name].float())


class GroupLasso(_OnChannels):
    """`group_factor` on every channel of every group: all its entries, where it is written, where it is read, and in norms.

    The strength of a channel is that of the penalty times the root of its number of entries, as by Yuan and Lin, so that wide
    and narrow groups feel the same. The largest `min_keep` of each group, which no plan would remove, are left alone.
    """

    def __init__(self, training: Training, *, graph: Graph, min_keep: float = 0.1, **options: Any) -> None:
        super().__init__(training, graph=graph, touched=training.parameters, **options)
        self.min_keep = min_keep

    def shrink_(self, amount: float) -> None:
        for entries in self.groups:
            norm_C = entries.norms()
            factor_C = group_factor(norm_C, amount * entries.entries_per_channel**0.5)
            factor_C[norm_C.topk(math.ceil(self.min_keep * entries.size)).indices] = 1
            entries.scale_(factor_C)

    def settle_(self, model: nn.Module) -> None:
        parts = [part for entries in self.groups for part in entries.parts]
        zero_where_zero_(model, {part.name: part.parameter for part in parts})


class BnSlimming(_OnChannels):
    """`soft_threshold` on the scales of norms that channels pass through, and on nothing else.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017; a proximal step in place
    of their subgradient.
    """

    def __init__(self, training: Training, *, graph: Graph, **options: Any) -> None:
        self.scales = norm_scales(graph, training.parameters)
        if not self.scales:
            raise ValueError("bn_slimming: no group passes through a norm with a scale. Choose group_lasso.")
        super().__init__(training, graph=graph, touched=self.scales, **options)

    def shrink_(self, amount: float) -> None:
        for scale in self.scales.values():
            scale.copy_(soft_threshold(scale, amount))

    def settle_(self, model: nn.Module) -> None:
        zero_where_zero_(model, self.scales)

    def figures(self) -> dict[str, float]:
        scales = torch.cat([scale.detach().reshape(-1) for scale in self.scales.values()])
        return {"zero_scales": float((scales == 0).double().mean())}


class Growing(Policy):
    """Weight decay that rises step by step on the channels marked for removal, until they have nothing left to give.

    Marked are the channels of least L2 norm at the beginning, as many as the budget asks for. Their decay is strength * k after k
    intervals, applied as w * (1 - min(1, lr * decay)).

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
        self.strength, self.every = strength, every
        self.last_rise = round(settled_after * training.num_steps)

    @torch.no_grad()
    def after_update(self, step: int, lr: float) -> None:
        decay = self.strength * (min(step, self.last_rise) // self.every + 1)
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
