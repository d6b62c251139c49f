"""Second-order statistics: products of the loss's Hessian with vectors, summed over rows. A pass of its own: each row costs one
backward through the backward for each product.

# g = gradient of the mean loss over the rows of the first pass, H = Hessian of the summed loss of a micro-batch
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.models.graph import Graph
from pipeline.models.task import Place, Task
from pipeline.saliency.statistics import HALF, multiplied

CURVATURE_KINDS = ("hessian_diag", "hessian_grad")


class CurvatureStatistics(Task):
    """The diagonal of H by Hutchinson's estimator, and H g.

    The estimator is v * H v with independent signs v: its mean is the diagonal, and it adds up over micro-batches. The signs are drawn
    from the bits of the micro-batch, so that whoever computes it, and when, draws the same.

    Args:
        gradient: "grad_sum/<tensor>" and "rows" of the first pass.

    Source: Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007 (diagonal); Wang, Zhang, Grosse, "Picking
    Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020 (H g).
    """

    def __init__(self, model: nn.Module, graph: Graph, gradient: Mapping[str, Tensor]) -> None:
        self.model = model
        self._names = list(multiplied(model, graph))
        rows = int(gradient["rows"])
        mean = [gradient[f"grad_sum/{name}"].double() / rows for name in self._names]
        top = max((float(g.abs().max()) for g in mean), default=0.0)
        self._scale = 2.0 ** -math.frexp(top)[1]  # a float16 would lose small gradients
        self._gradient = [(g * self._scale).float() for g in mean]
        self._parameters: list[nn.Parameter] = []
        self._device = torch.device("cpu")

    def place(self, place: Place) -> None:
        self.model = place(self.model)
        self._device = next(self.model.parameters()).device
        named = dict(self.model.named_parameters())
        self._parameters = [named[name] for name in self._names]
        for parameter in self._parameters:
            parameter.requires_grad_()
        self._gradient = [g.to(self._device, p.dtype) for g, p in zip(self._gradient, self._parameters, strict=True)]

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """Sums over the rows: "hessian_diag/<tensor>", "hessian_grad/<tensor>" like the weight, "rows" int64."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            logits = self.model(images_NCHW)
            logits = logits.float() if logits.dtype in HALF else logits
            loss = F.cross_entropy(logits, labels_N, reduction="sum")
            grads = torch.autograd.grad(loss, self._parameters, create_graph=True, materialize_grads=True)
            signs = self._signs(images_NCHW)
            diagonal = [
                sign * value for sign, value in zip(signs, self._product(grads, signs, retain=True), strict=True)
            ]
            flow = [v.float() / self._scale for v in self._product(grads, self._gradient, retain=False)]
        sums = {"rows": torch.tensor(len(labels_N), dtype=torch.int64)}
        for kind, values in zip(CURVATURE_KINDS, (diagonal, flow), strict=True):
            sums |= {f"{kind}/{name}": value.float() for name, value in zip(self._names, values, strict=True)}
        return sums

    def _product(self, grads: tuple[Tensor, ...], vector: list[Tensor], *, retain: bool) -> tuple[Tensor, ...]:
        if not any(grad.requires_grad for grad in grads):  # a loss that is linear in every weight
            return tuple(torch.zeros_like(parameter) for parameter in self._parameters)
        curved = [(grad, v) for grad, v in zip(grads, vector, strict=True) if grad.requires_grad]
        outputs, weights = zip(*curved, strict=True)
        found = torch.autograd.grad(
            outputs, self._parameters, grad_outputs=weights, retain_graph=retain, materialize_grads=True
        )
        return tuple(value.detach() for value in found)

    def _signs(self, images_NCHW: Tensor) -> list[Tensor]:
        digest = hashlib.blake2b(images_NCHW.detach().float().cpu().contiguous().numpy().data, digest_size=7).digest()
        generator = torch.Generator(self._device).manual_seed(int.from_bytes(digest, "little"))
        return [
            torch.randint(0, 2, p.shape, generator=generator, device=self._device).mul_(2).sub_(1).to(p.dtype)
            for p in self._parameters
        ]
