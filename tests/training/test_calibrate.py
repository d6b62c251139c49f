from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.testing import assert_close

from pipeline.training.calibrate import BatchNormStatistics, apply_statistics
from tests.training.toy import same_tensors, toy_model


def add(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([part[key] for part in parts]).sum(0) for key in parts[0]}


CPU = torch.device("cpu")


def statistics(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    task = BatchNormStatistics({"m": model})
    task.to(CPU)
    return task(images, labels)


def two_norms() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Dropout(0.5)
    )


def test_statistics_of_a_hand_worked_batch():
    # Values 1, 3, 5, 7 of one channel: mean 4, unbiased variance (9 + 1 + 1 + 9) / 3.
    task = BatchNormStatistics({"m": nn.Sequential(nn.BatchNorm2d(1))})
    task.to(CPU)
    sums = task(torch.tensor([[1.0, 3.0], [5.0, 7.0]])[:, None, None], torch.zeros(2))
    assert sums["m/0/mean"].tolist() == [4.0]
    assert sums["m/0/var"].item() == pytest.approx(20 / 3)
    assert sums["m/0/count"] == 1
    assert sums["m/0/mean"].dtype == torch.float64


def test_equals_torchs_own_cumulative_average():
    batches = [torch.randn(6, 3, 8, 8) * (k + 1) + k for k in range(4)]
    model = two_norms().eval()
    direct = copy.deepcopy(model)
    for layer in (direct[1], direct[3]):
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for batch in batches:
        direct(batch)
    task = BatchNormStatistics({"m": model})
    task.to(CPU)
    calibrated = apply_statistics(model, add([task(batch, torch.zeros(6)) for batch in batches]), "m")
    for name, tensor in direct.state_dict().items():
        assert_close(calibrated.state_dict()[name], tensor, rtol=1e-5, atol=1e-6)


def test_models_share_a_pass_and_none_is_changed():
    models = {"a": two_norms().train(), "b": toy_model().eval()}
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    task = pickle.loads(pickle.dumps(BatchNormStatistics(models)))
    task.to(CPU)
    images = torch.randn(4, 3, 8, 8)
    sums = task(images, torch.zeros(4))
    assert {key.split("/")[0] for key in sums} == {"a", "b"}
    assert same_tensors(sums, task(images, torch.zeros(4)))  # a task keeps nothing between micro-batches
    calibrated = apply_statistics(models["a"], sums, "a")
    assert all(same_tensors(before[name], model.state_dict()) for name, model in models.items())
    assert models["a"].training
    assert calibrated.training
    assert not torch.equal(calibrated[1].running_mean, models["a"][1].running_mean)
    assert calibrated[1].momentum == 0.1


def test_broken_old_statistics_are_replaced():
    model = nn.Sequential(nn.BatchNorm2d(2))
    model[0].running_mean.fill_(float("nan"))
    model[0].running_var.fill_(float("inf"))
    sums = statistics(model, torch.randn(4, 2, 3, 3), torch.zeros(4))
    fixed = apply_statistics(model, sums, "m")
    assert bool(fixed[0].running_mean.isfinite().all())
    assert bool(fixed[0].running_var.isfinite().all())


def test_layer_used_twice_counts_twice():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x) + 7)

    sums = statistics(Twice(), torch.tensor([[1.0, 3.0]])[:, None, None], torch.zeros(1))
    assert sums["m/norm/count"] == 2
    assert sums["m/norm/mean"].item() == pytest.approx(2 + 7)


def test_layer_that_no_forward_called_keeps_its_statistics():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other = nn.BatchNorm2d(1), nn.BatchNorm2d(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    model = Unused()
    model.other.running_mean.fill_(5.0)
    sums = statistics(model, torch.randn(4, 1, 2, 2), torch.zeros(4))
    assert apply_statistics(model, sums, "m").other.running_mean.item() == 5.0


def test_errors_name_what_is_missing():
    model = nn.Sequential(nn.BatchNorm2d(1))
    with pytest.raises(ValueError, match=r"1 image\(s\) leave one value per channel in a batch norm of model 'm'"):
        statistics(model, torch.randn(1, 1, 1, 1), torch.zeros(1))
    sums = statistics(model, torch.randn(4, 1, 1, 1), torch.zeros(4))
    with pytest.raises(ValueError, match=r"no statistics of batch norm '0' of model 'n'. There are some of: m"):
        apply_statistics(model, sums, "n")
