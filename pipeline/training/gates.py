"""Hard-concrete gates: L0 regularisation of channels or of single weights, steered to a budget by a Lagrangian.

# C = channels of a group, G = groups, T = tensors, D = dimensions of a tensor

A gate z in [0, 1] multiplies what a channel gives to those who read it, or one weight. As contractions are linear in their weights,
both are done by scaling weights, w * f, for the time of one forward and backward, with a factor f made of gates; the gradient G of the
scaled weight then gives dL/dw = G * f and dL/df = G * w. So gates need neither hooks nor a network that knows of them, and under data
parallelism they see the averaged gradient, the same on every rank.

Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR 2018; a budget as a Lagrangian
constraint: Wang, Wohlwend, Lei, "Structured Pruning of Large Language Models", EMNLP 2020.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.costs import Measure
from pipeline.models.graph import Graph
from pipeline.training.entries import Entries, Remaining, entries_of, remaining_cost
from pipeline.training.policy import Policy, Training
from pipeline.training.step import mixed_seed

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature, and the interval to which the concrete distribution is stretched before it is clipped; as in the paper."""
INITIAL_ALPHA = 2.0
"""A gate of a trained network begins nearly open: 0.96 without noise."""
SOLVING_STEPS = 4
CLOSE_ENOUGH = 1e-3
LARGEST_MOVE = 1.0
"""How the multiplier of a step is solved for: at most so many evaluations, until the aim is missed by this, moving a gate by this at most."""


def sampled(alpha: Tensor, uniform: Tensor) -> Tensor:
    """z = clip(s (zeta - gamma) + gamma, 0, 1) with s = sigmoid((ln u - ln(1 - u) + alpha) / beta); equations 10 and 11."""
    s = ((uniform.log() - (-uniform).log1p() + alpha) / BETA).sigmoid()
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def without_noise(alpha: Tensor) -> Tensor:
    """The gate after training: clip(sigmoid(alpha) (zeta - gamma) + gamma, 0, 1); equation 13."""
    return (alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def probability_open(alpha: Tensor) -> Tensor:
    """P(z > 0) = sigmoid(alpha - beta ln(-gamma / zeta)); equation 12. Its sum is the expected L0 norm."""
    return (alpha - BETA * math.log(-GAMMA / ZETA)).sigmoid()


# --- what gates scale -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelGates:
    """One gate for each channel, on the weights that read it. A channel that is closed gives nothing: as if it were cut."""

    entries: Entries

    @property
    def size(self) -> tuple[int, ...]:
        return (self.entries.size,)

    def factors(self, z: Tensor) -> list[tuple[str, Tensor]]:
        return [(part.name, part.along(z)) for part in self.entries.parts]


@dataclass(frozen=True)
class WeightGates:
    """One gate for each entry of a weight."""

    name: str
    weight: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    def factors(self, z: Tensor) -> list[tuple[str, Tensor]]:
        return [(self.name, z)]


def remaining_weights(open_by_name: Mapping[str, Tensor]) -> Tensor:
    """Mean over all gated weights."""
    total = torch.stack([p.double().sum() for p in open_by_name.values()]).sum()
    return total / sum(p.numel() for p in open_by_name.values())


# --- the policy -------------------------------------------------------------------------------------------------------


class HardConcrete(Policy):
    """Gates on channels or on weights whose expected cost follows an aim down to the budget.

    The aim falls linearly from the whole to the budget until `settled_after` of the training. After each step of Adam on the
    gates' part of the loss, they move along the gradient of the expected cost until it meets the aim: a Lagrangian step
    whose multiplier is solved for. A multiplier that rises by steps of its own, as in the source, swings: in 120 steps with
    budget 0.5 it ended between 0.06 and 0.81, by its rate. One sample of all gates serves a global batch, the same on every rank.
    """

    def __init__(
        self,
        training: Training,
        *,
        gates: Mapping[str, ChannelGates | WeightGates],
        remaining: Remaining,
        budget: float,
        lr: float,
        settled_after: float,
        min_open: float = 0.0,
    ) -> None:
        self.training, self.gates, self.remaining = training, gates, remaining
        self.budget, self.aim_steps = budget, max(1, round(settled_after * training.num_steps))
        self.alphas = {
            name: torch.full(gate.size, INITIAL_ALPHA, device=training.device, requires_grad=True)
            for name, gate in gates.items()
        }
        self.min_open = min_open
        self.adam = torch.optim.Adam(self.alphas.values(), lr=lr)
        self.left = 1.0
        self.weights: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}

    def before_forward(self, step: int) -> None:
        # The same numbers on every rank: its device and the step decide.
        generator = torch.Generator(self.training.device).manual_seed(mixed_seed(self.training.seed, step))
        z = {}
        for name, alpha in self.alphas.items():
            uniform = torch.rand(alpha.shape, generator=generator, device=alpha.device).clamp(1e-6, 1 - 1e-6)
            z[name] = sampled(alpha, uniform)
        self.factors = self._factors(z)
        with torch.no_grad():
            for tensor, factor in self.factors.items():
                parameter = self.training.parameters[tensor]
                self.weights[tensor] = parameter.detach().clone()
                parameter.mul_(factor)

    def _factors(self, z: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weight -> product of the gates that stand before it, in a shape that broadcasts to its own."""
        factors: dict[str, Tensor] = {}
        for name, gate in self.gates.items():
            for tensor, factor in gate.factors(z[name]):
                factors[tensor] = factors[tensor] * factor if tensor in factors else factor
        return factors

    def after_backward(self, step: int) -> None:
        self.adam.zero_grad()
        gradients = {tensor: self._restored(tensor, factor) for tensor, factor in self.factors.items()}
        torch.autograd.backward([*self.factors.values()], [*gradients.values()])
        self.adam.step()
        self._hold_open_()
        self._steer_(1 - (1 - self.budget) * min(1.0, (step + 1) / self.aim_steps))
        self.factors = {}

    @torch.no_grad()
    def _restored(self, tensor: str, factor: Tensor) -> Tensor:
        """Give a weight back, turn its gradient into that of the weight itself, and return dL/df."""
        parameter, weight = self.training.parameters[tensor], self.weights.pop(tensor)
        parameter.copy_(weight)
        if parameter.grad is None:
            return torch.zeros_like(factor)
        gradient = (parameter.grad * weight).sum_to_size(factor.shape).to(factor.dtype)
        parameter.grad.mul_(factor)
        return gradient

    @torch.no_grad()
    def _hold_open_(self) -> None:
        """The most open `min_open` of each group, which no plan would remove: otherwise a whole layer may close."""
        for alpha in self.alphas.values() if self.min_open else ():
            best = alpha.topk(math.ceil(self.min_open * len(alpha))).indices
            alpha[best] = alpha[best].clamp(min=INITIAL_ALPHA)

    def _steer_(self, aim: float) -> None:
        """Move the gates along the gradient of the expected cost until it is the aim: alpha - m * dr/dalpha for the m that does it."""
        left = self._left(0.0, {})
        gradients = torch.autograd.grad(left, [*self.alphas.values()])
        mean_square = sum(float(g.double().square().sum()) for g in gradients) / sum(g.numel() for g in gradients)
        unit = {name: g / (mean_square**0.5 or 1.0) for name, g in zip(self.alphas, gradients, strict=True)}
        with torch.no_grad():
            self.left, move, slope = float(left), 0.0, -(mean_square**0.5) * sum(g.numel() for g in gradients)
            for _ in range(SOLVING_STEPS):
                if abs(self.left - aim) <= CLOSE_ENOUGH or slope == 0:
                    break
                further = max(-LARGEST_MOVE, min(LARGEST_MOVE, (aim - self.left) / slope))
                before, move = self.left, move + further
                self.left = float(self._left(move, unit))
                slope = (self.left - before) / further
            for name, alpha in self.alphas.items():
                alpha.sub_(move * unit[name])

    def _left(self, move: float, unit: Mapping[str, Tensor]) -> Tensor:
        """The part that is expected to remain when every gate has moved against `unit`."""
        alphas = {name: alpha - move * unit[name] if unit else alpha for name, alpha in self.alphas.items()}
        return self.remaining({name: probability_open(alpha) for name, alpha in alphas.items()})

    @torch.no_grad()
    def settle_(self, model: nn.Module) -> None:
        """The gates go into the weights: closed ones leave exact zeros."""
        own = dict(model.named_parameters())
        for tensor, factor in self._factors(
            {name: without_noise(alpha) for name, alpha in self.alphas.items()}
        ).items():
            own[tensor].mul_(factor.to(own[tensor].device))

    def shared(self) -> Mapping[str, Tensor]:
        return self.alphas

    def figures(self) -> dict[str, float]:
        closed = torch.cat([(without_noise(alpha.detach()) == 0).reshape(-1) for alpha in self.alphas.values()])
        return {"closed_gates": float(closed.double().mean()), "expected_to_remain": self.left}

    def statistics(self) -> dict[str, Tensor]:
        return {f"gate_open/{name}": probability_open(alpha.detach()).cpu() for name, alpha in self.alphas.items()}

    def state_dict(self) -> dict[str, Any]:
        alphas = {name: alpha.detach() for name, alpha in self.alphas.items()}
        return {"alphas": alphas, "adam": self.adam.state_dict(), "left": self.left}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, alpha in self.alphas.items():
            alpha.copy_(state["alphas"][name])
        self.adam.load_state_dict(state["adam"])
        self.left = state["left"]


def channel_gates(
    training: Training,
    *,
    graph: Graph,
    measure: Measure,
    budget: float,
    lr: float,
    settled_after: float,
    min_keep: float = 0.1,
) -> HardConcrete:
    """Gates on the channels of every group; `budget` is the fraction of parameters or MACs that remains."""
    gates = {entries.name: ChannelGates(entries) for entries in entries_of(graph, training.parameters, ("in",))}
    if not gates:
        raise ValueError("hard_concrete: no channel can be removed from this network, so there is nothing to gate.")
    return HardConcrete(
        training,
        gates=gates,
        remaining=remaining_cost(graph, measure),
        budget=budget,
        lr=lr,
        settled_after=settled_after,
        min_open=min_keep,
    )


def weight_gates(
    training: Training, *, names: Sequence[str], budget: float, lr: float, settled_after: float
) -> HardConcrete:
    """Gates on every entry of the named weights; `budget` is the fraction of them that remains."""
    gates = {name: WeightGates(name, training.parameters[name]) for name in names}
    return HardConcrete(
        training, gates=gates, remaining=remaining_weights, budget=budget, lr=lr, settled_after=settled_after
    )
