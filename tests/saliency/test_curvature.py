"""Second-order statistics against Hessians that are worked out otherwise."""

from __future__ import annotations

import timm
import torch
from torch import nn

from pipeline.models.trace import propagate
from pipeline.saliency.curvature import CurvatureStatistics
from pipeline.saliency.statistics import accumulate
from tests.graphs import chain


def logistic() -> nn.Module:
    """Two inputs, logits (w x, 0): the loss of label 0 is log(1 + exp(-w x)), its Hessian x x^T p (1 - p)."""
    model = nn.Sequential()
    model.add_module("fc0", nn.Linear(2, 2, bias=False))
    model = model.double()
    model.fc0.weight.data = torch.tensor([[1.0, -1.0], [0.0, 0.0]]).double()
    return model


def test_hessian_products_of_a_softmax_worked_out_by_hand():
    model, graph = logistic(), chain(2, 2)
    images, labels = torch.tensor([[1.0, 2.0], [0.5, -1.0]]).double(), torch.tensor([0, 1])
    first = accumulate(model, graph, [(images, labels)], weights=True)
    task = CurvatureStatistics(model, graph, first)
    task.to(torch.device("cpu"))
    found = task(images, labels)
    # H between entries (i, a) and (j, b) of the weight: sum over rows of x_a x_b * (p_i [i = j] - p_i p_j).
    p = (images @ model.fc0.weight.T).softmax(1).detach()
    hessian = sum(
        torch.kron(torch.diag(p_n) - torch.outer(p_n, p_n), torch.outer(x_n, x_n))
        for p_n, x_n in zip(p, images, strict=True)
    )
    expected = hessian @ (first["grad_sum/fc0.weight"].reshape(-1) / 2)
    assert torch.allclose(found["hessian_grad/fc0.weight"].double().reshape(-1), expected, rtol=1e-5)
    signs = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [1, 1, -1, 1], [1, 1, -1, -1], [1, -1, 1, 1], [1, -1, 1, -1]])
    signs = torch.cat([signs, torch.tensor([[1.0, -1, -1, 1], [1, -1, -1, -1]])]).double()  # v and -v give the same
    possible = signs * (signs @ hessian)
    estimate = found["hessian_diag/fc0.weight"].double().reshape(-1)
    assert min((possible - estimate).abs().amax(1)) < 1e-5
    assert torch.allclose(possible.mean(0), hessian.diagonal())  # what the estimator means


def test_the_signs_come_from_the_rows_and_from_nothing_else():
    model, graph = logistic(), chain(2, 2)
    images, labels = torch.randn(6, 2).double(), torch.zeros(6, dtype=torch.int64)
    first = accumulate(model, graph, [(images, labels)], weights=True)

    def run(rows: torch.Tensor) -> dict[str, torch.Tensor]:
        task = CurvatureStatistics(model, graph, first)
        task.to(torch.device("cpu"))
        torch.manual_seed(int(torch.randint(1000, ())))
        return task(rows, labels[: len(rows)])

    assert torch.equal(run(images)["hessian_diag/fc0.weight"], run(images)["hessian_diag/fc0.weight"])
    estimates = {tuple(run(images[:n])["hessian_diag/fc0.weight"].sign().reshape(-1).tolist()) for n in range(1, 7)}
    assert len(estimates) > 1


def test_networks_with_norms_pools_and_attention_have_second_derivatives():
    for name, size in (("resnet18", 32), ("vit_tiny_patch16_224", 224)):
        torch.manual_seed(0)
        model = timm.create_model(name, num_classes=4).eval()
        images, labels = torch.randn(2, 3, size, size), torch.tensor([0, 3])
        graph = propagate(model, images[:1])
        first = accumulate(model, graph, [(images, labels)], weights=True)
        task = CurvatureStatistics(model, graph, first)
        task.to(torch.device("cpu"))
        sums = task(images, labels)
        assert all(bool(value.isfinite().all()) for value in sums.values() if value.is_floating_point())
        assert any(bool((value != 0).any()) for key, value in sums.items() if key.startswith("hessian_grad/"))
