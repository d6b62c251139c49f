"""Statistics of the saliency pass: additive sums over rows, from which every criterion is computed afterwards.

# N = rows of a micro-batch, C = channels of a group, K = entries of one channel, F = input features of a consumer

A channel gate multiplies a channel by 1 where the network reads it; the gradient at the gate of row n is
s[n, c] = sum x * dL/dx over the channel's entries at *all* its consumers, which is the first-order change of that row's loss when
the channel is cut. Gates sit at the consumers and not at the producers, because that is where a cut acts: biases, squeeze-and-excite
factors and activations without s(0) = 0 on the way are then accounted for exactly. The sum over consumers comes before abs and square.

No weight gradient is needed, so the pass is cheaper than a training step. The loss is summed over rows, never averaged: nothing
depends on the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from pipeline.models.graph import Graph, Site
from pipeline.models.modes import eval_mode

WEIGHT_KINDS = ("grad_sum", "grad_abs", "grad_square", "gw_abs", "gw_square")
GATE_KINDS = ("gate_sum", "gate_abs", "gate_square")

Tap = Callable[[Tensor, Tensor], None]


class _Gate(torch.autograd.Function):
    """Identity forward; backward shows the input and its gradient to `tap`. Costs no multiplication in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tap: Tap) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tap = tap
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.tap(x, grad)
        return grad, None


def gate_terms(x: Tensor, grad: Tensor, axis: int) -> Tensor:
    """s per row and feature: x * dL/dx summed over all axes but the rows and the channel axis; float64 [N, F]."""
    product = x * grad
    other = [dim for dim in range(1, x.dim()) if dim != axis % x.dim()]
    return (product.sum(dim=other) if other else product).double()


class GateStatistics:
    """A Task: channel gates of every group for each row of a micro-batch, and on request the gradient statistics of every weight.

    Args:
        model: the dense network; evaluated with its running statistics, since a row's saliency must not depend on its neighbours.
        graph: its channel groups.
        weights: also sum g, |g|, g^2, |g*w| and (g*w)^2 over micro-batches, per weight. g is the gradient of the micro-batch's
            summed loss.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3 (gates); per-row squares:
    Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018.
    """

    def __init__(self, model: nn.Module, graph: Graph, *, weights: bool = False) -> None:
        self.model = model
        self.graph = graph
        self.weights = weights
        self._device = torch.device("cpu")
        self._terms: dict[str, Tensor] = {}
        self._indices: dict[tuple[str, int], Tensor] = {}

    def to(self, device: torch.device) -> None:
        self._device = device
        self.model.to(device).eval().requires_grad_(self.weights)
        self._indices = {
            (group.name, i): site.index_CK.to(device)
            for group in self.graph.groups
            for i, site in enumerate(group.consumers)
        }

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """Sums over the rows: "gate_*/<group>" float64 [C], "<kind>/<tensor>" like the weight, "loss" float64, "rows" int64."""
        num_rows = len(labels_N)
        self._terms = {
            group.name: torch.zeros(num_rows, group.size, dtype=torch.float64, device=self._device)
            for group in self.graph.groups
        }
        handles = self._install()
        try:
            with torch.enable_grad():
                loss = F.cross_entropy(self.model(images_NCHW).float(), labels_N, reduction="sum")
                loss.backward()
        finally:
            for handle in handles:
                handle.remove()
        sums: dict[str, Tensor] = {
            "rows": torch.tensor(num_rows, dtype=torch.int64, device=self._device),
            "loss": loss.detach().double(),
        }
        for name, terms_NC in self._terms.items():
            sums[f"gate_sum/{name}"] = terms_NC.sum(0)
            sums[f"gate_abs/{name}"] = terms_NC.abs().sum(0)
            sums[f"gate_square/{name}"] = terms_NC.square().sum(0)
        if self.weights:
            sums.update(self._weight_sums())
        return sums

    def _install(self) -> list[RemovableHandle]:
        """One hook per consumer module, whichever groups it reads."""
        taps: dict[str, list[tuple[str, int, Site]]] = {}
        for group in self.graph.groups:
            for i, site in enumerate(group.consumers):
                taps.setdefault(site.module, []).append((group.name, i, site))
        modules = dict(self.model.named_modules())
        return [modules[name].register_forward_pre_hook(self._hook(sites)) for name, sites in taps.items()]

    def _hook(self, sites: list[tuple[str, int, Site]]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        axis = sites[0][2].axis

        def tap(x: Tensor, grad: Tensor) -> None:
            terms_NF = gate_terms(x, grad, axis)
            for group, i, _ in sites:
                self._terms[group] += terms_NF[:, self._indices[group, i]].sum(-1)

        def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]
            if not x.requires_grad:  # below the first gate nothing needs a gradient: start the tape here
                x = x.detach().requires_grad_()
            return (_Gate.apply(x, tap), *args[1:])

        return hook

    def _weight_sums(self) -> dict[str, Tensor]:
        sums = {}
        for name, parameter in self.model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            product = (grad * parameter.detach()).double()
            grad = grad.double()
            values = (grad, grad.abs(), grad.square(), product.abs(), product.square())
            sums.update({f"{kind}/{name}": value for kind, value in zip(WEIGHT_KINDS, values, strict=True)})
            parameter.grad = None
        return sums


def accumulate(
    model: nn.Module, graph: Graph, batches: Iterable[tuple[Tensor, Tensor]], *, weights: bool = False
) -> dict[str, Tensor]:
    """Statistics of `batches` of (images_NCHW, labels_N) in this process, in their order. The model is left as it was."""
    grads = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    device = next(model.parameters()).device
    task = GateStatistics(model, graph, weights=weights)
    sums: dict[str, Tensor] = {}
    try:
        for p in model.parameters():
            p.grad = None
        with eval_mode(model):
            task.to(device)
            for images, labels in batches:
                for name, value in task(images.to(device), labels.to(device)).items():
                    sums[name] = sums[name] + value if name in sums else value
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(grads[name][0])
            p.grad = grads[name][1]
    return {name: value.cpu() for name, value in sums.items()}
