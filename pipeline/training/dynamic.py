"""Masks that training keeps, and masks that change while it goes on. True = keep.

Masks cover weights, gradients, momentum and, at the end, averaged weights. Rank 0 decides, all ranks hold the same (`agreed`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.graph import Graph
from pipeline.pruning.masks import mask_
from pipeline.pruning.plan import Plan
from pipeline.pruning.sparsity import Pattern, kept_fraction, weight_masks
from pipeline.saliency.channel_rules import Saliency
from pipeline.training.entries import entries_of, norm_scales, removed_entries
from pipeline.training.penalties import PlanOf
from pipeline.training.policy import Policy, Training, agreed, require_zeros


class Masked(Policy):
    """Masks that stay as they are: what was pruned stays zero, bit for bit, and the budget holds at every step."""

    def __init__(self, training: Training, *, masks: Mapping[str, Tensor]) -> None:
        self.training = training
        unknown = sorted(set(masks) - set(training.parameters))
        if unknown:
            raise ValueError(
                f"masks name {unknown[:3]}, which are no parameters of the network. They are of another one."
            )
        self._masks = {name: mask.to(training.device) for name, mask in masks.items()}
        self._zero_()

    def masks(self) -> Mapping[str, Tensor]:
        return self._masks

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        for name, mask in self._masks.items():
            grad = self.training.parameters[name].grad
            if grad is not None:
                grad.mul_(mask)

    @torch.no_grad()
    def _zero_(self) -> None:
        """Masked weights, and what the optimizer remembers of them."""
        mask_(self.training.parameters, self._masks)
        for name, mask in self._masks.items():
            parameter = self.training.parameters[name]
            for value in self.training.optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(~mask, 0)

    def require_zeros(self) -> None:
        require_zeros(self.training.parameters, self._masks)

    def settle_(self, model: nn.Module) -> None:
        mask_(dict(model.named_parameters()), self._masks)

    def figures(self) -> dict[str, float]:
        if not self._masks:
            return {"masked": 0.0}
        kept = torch.stack([mask.sum() for mask in self._masks.values()]).sum()
        return {"masked": 1 - float(kept) / sum(mask.numel() for mask in self._masks.values())}

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self._masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._masks = {name: mask.to(self.training.device) for name, mask in state["masks"].items()}


def silence_(grad: Tensor | None, mask: Tensor) -> None:
    """No gradient for outputs that have no weight left.

    Such an output has no variance, and a norm behind it multiplies its gradient by 1 / sqrt(eps), about 300: it would outbid all others
    and come back with a huge weight. On digits, at 10 % of the weights, RigL ended at 93 % with this and at 88 % without.
    """
    if grad is not None:
        grad.mul_(mask.flatten(1).any(1).reshape(-1, *[1] * (grad.dim() - 1)))


class Decisions:
    """When masks are decided anew: every `every` steps, for the last time after `settled_after` of the training."""

    def __init__(self, num_steps: int, every: int, settled_after: float) -> None:
        self.every, self.last = every, max(1, round(settled_after * num_steps))

    def at(self, num_updates: int) -> bool:
        return num_updates == self.last or (num_updates < self.last and num_updates % self.every == 0)

    def progress(self, num_updates: int) -> float:
        """0 at the beginning, 1 from the last decision on."""
        return min(1.0, num_updates / self.last)

    def to_do(self, num_updates: int) -> float:
        """(1 - t / T)^3, the part of what is to be removed that still stays: much goes at first, and less and less.

        Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.
        """
        return (1 - self.progress(num_updates)) ** 3


class _Changing(Masked):
    """Masks of weights that are decided anew from time to time, in one pattern and scope."""

    def __init__(
        self,
        training: Training,
        *,
        names: Sequence[str],
        pattern: str,
        keep: float | None,
        scope: str,
        every: int,
        settled_after: float,
    ) -> None:
        self.names, self.pattern, self.scope = names, pattern, scope
        self.keep = float(kept_fraction(pattern, keep))
        self.decisions = Decisions(training.num_steps, every, settled_after)
        super().__init__(training, masks={})

    def by_magnitude(self, keep: float) -> dict[str, Tensor]:
        """The largest weights stay; decided by rank 0, on the CPU."""
        fraction = keep if Pattern.parse(self.pattern).num_keep is None else None  # N:M has its own

        def decide() -> dict[str, Tensor]:
            scores = {name: self.training.parameters[name].detach().abs().cpu() for name in self.names}
            return weight_masks(scores, pattern=self.pattern, keep=fraction, scope=self.scope)

        return agreed(decide, self.training)


class Cubic(_Changing):
    """Gradual magnitude pruning: the part that stays falls as keep + (1 - keep) (1 - t / T)^3; what is masked does not return.

    Source: Zhu and Gupta, "To prune, or not to prune", 2017, equation 1.
    """

    def keep_at(self, num_updates: int) -> float:
        return self.keep + (1 - self.keep) * self.decisions.to_do(num_updates)

    def after_update(self, step: int, lr: float) -> None:
        if self.decisions.at(step + 1):
            self._masks = self.by_magnitude(self.keep_at(step + 1))
            self._zero_()


class DynamicPruningWithFeedback(Cubic):
    """The dense weights are kept and updated, with the gradient taken at the masked ones: what was masked by mistake returns.

    The part that stays falls as in `Cubic`, to which the paper's algorithm adds the feedback.

    Source: Lin, Stich, Barba, Dmitriev, Jaggi, "Dynamic Model Pruning with Feedback" (DPF), ICLR 2020, algorithm 1.
    """

    def __init__(self, training: Training, **options: Any) -> None:
        super().__init__(training, **options)
        self.dense: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_forward(self, step: int) -> None:
        for name, mask in self._masks.items():
            parameter = self.training.parameters[name]
            self.dense[name] = parameter.detach().clone()
            parameter.mul_(mask)

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        for name, dense in self.dense.items():
            parameter = self.training.parameters[name]
            silence_(parameter.grad, self._masks[name])
            parameter.copy_(dense)
        self.dense.clear()

    def require_zeros(self) -> None:
        """Dense weights have none until the training is over."""

    def _zero_(self) -> None:
        """Dense weights stay until the training is over (`settle_`)."""


class RigL(_Changing):
    """As many weights as always, but not the same: each decision drops small weights and grows those whose dense gradient is large.

    A decision moves the fraction exchange / 2 (1 + cos(pi t / T)) of a layer's weights. Grown ones begin at zero. Unlike in the
    paper, the update of a deciding step is made, too, and outputs that have lost all weights stay so (`silence_`).

    Source: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery", ICML 2020, algorithm 1.
    """

    def __init__(self, training: Training, *, exchange: float, **options: Any) -> None:
        require_single_weights(options["pattern"])
        super().__init__(training, **options)
        self.exchange = exchange
        self._masks = self.by_magnitude(self.keep)
        self._zero_()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if step and self.decisions.at(step):
            fraction = self.exchange / 2 * (1 + math.cos(math.pi * self.decisions.progress(step)))
            self._masks = agreed(lambda: {name: self._moved(name, fraction) for name in self._masks}, self.training)
            self._zero_()
        super().after_backward(step)

    def _moved(self, name: str, fraction: float) -> Tensor:
        parameter, mask = self.training.parameters[name], self._masks[name]
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        silence_(grad, mask)
        return moved(parameter.detach(), grad, mask, fraction)


def require_single_weights(pattern: str | None) -> None:
    if pattern != "unstructured":
        raise ValueError(
            f"rigl moves single weights; masks.pattern is {pattern}. Choose unstructured, or the method dpf."
        )


def moved(weight: Tensor, grad: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The mask after dropping round(fraction * kept) of the smallest kept weights, and growing as many of the rest by |gradient|.

    What was just dropped may grow again. Of equal values the first goes, or comes, first.
    """
    kept = mask.reshape(-1)
    count = round(fraction * int(kept.sum()))
    size = weight.reshape(-1).abs().masked_fill(~kept, torch.inf)
    stays = kept.clone()
    stays[size.argsort(stable=True)[:count]] = False
    gain = grad.reshape(-1).abs().masked_fill(stays, -1)
    stays[gain.argsort(stable=True, descending=True)[:count]] = True
    return stays.reshape(mask.shape)


class SoftFilter(Masked):
    """Channels of least size are set to zero again and again; they train on and may return. In the end they stay, and the budget is met.

    The size of a channel is that of its norm's scale, or the L2 norm of its filter where there is no norm, relative to its
    group's mean. What the budget removes is set to zero part by part, 1 - (1 - t / T)^3 of it at time t. After the last
    decision all that a cut would take away is masked.

    Unlike in the paper, the scale of the norm is set to zero where there is a norm, and the filter keeps its weights: a filter of
    zeros has no variance, so that the norm multiplies its gradient by 1 / sqrt(eps), about 300. The filter then comes back with a
    huge L2 norm, which means nothing behind a norm, and learns as slowly. The shift stays, as in the paper.

    Source: He, Kang, Dong, Fu, Yang, "Soft Filter Pruning", IJCAI 2018, algorithm 1; the rising part: He et al., "Asymptotic Soft
    Filter Pruning", IEEE Transactions on Cybernetics 2019.
    """

    def __init__(self, training: Training, *, graph: Graph, plan_of: PlanOf, every: int, settled_after: float) -> None:
        super().__init__(training, masks={})
        self.plan_of = plan_of
        self.decisions = Decisions(training.num_steps, every, settled_after)
        self.sized = {entries.name: entries for entries in entries_of(graph, training.parameters, ("out",))}
        self.sized |= {entries.name: entries for entries in entries_of(graph, norm_scales(graph, training.parameters))}
        """What tells the size of a channel, and is set to zero: the scale of its norm, else its filter."""

    def after_update(self, step: int, lr: float) -> None:
        if not self.decisions.at(step + 1):
            return
        share = 1 - self.decisions.to_do(step + 1)
        if step + 1 == self.decisions.last:
            self._masks = agreed(self._all_removed, self.training)
            self._zero_()
            return
        for name, kept_C in agreed(lambda: self._kept(share), self.training).items():
            self.sized[name].scale_(kept_C.float())

    def _plan(self) -> tuple[Plan, Saliency]:
        sizes = {name: entries.norms().double().cpu() for name, entries in self.sized.items()}
        saliency = {name: size_C / size_C.mean().clamp(min=1e-12) for name, size_C in sizes.items()}
        return self.plan_of(saliency), saliency

    def _kept(self, share: float) -> dict[str, Tensor]:
        """Channels that are not set to zero now: of those that the budget removes the smallest part, and no other, is."""
        plan, saliency = self._plan()
        kept = {}
        for group in plan.groups:
            removed = sorted(group.removed, key=lambda c: (float(saliency[group.name][c]), c))
            kept[group.name] = torch.ones(group.size, dtype=torch.bool)
            kept[group.name][removed[: round(share * len(removed))]] = False
        return kept

    def _all_removed(self) -> dict[str, Tensor]:
        plan, _ = self._plan()
        return removed_entries(plan, {name: p.detach() for name, p in self.training.parameters.items()})
