from __future__ import annotations

import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.evaluate import Evaluation, summarise

CPU = torch.device("cpu")


class Logits(nn.Module):
    """Gives the images' own numbers, times a factor: logits are chosen by the test."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images_NCHW: Tensor) -> Tensor:
        return images_NCHW.flatten(1) * self.factor


def rows(*logits: list[float]) -> Tensor:
    return torch.tensor(logits)[:, :, None, None]


def test_sums_of_hand_worked_logits():
    task = Evaluation({"dense": Logits(), "pruned": Logits(-1.0)}, num_classes=3, reference="dense")
    task.to(CPU)
    images = rows([2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 0.0, 0.0])
    sums = task(images, torch.tensor([0, 2, 1]))
    assert sums["rows"] == 3
    assert sums["class_rows"].tolist() == [1, 1, 1]
    assert sums["dense/top1"] == 1  # predictions 0, 1, 0
    assert sums["dense/top5"] == 3  # three classes are all in the top five
    assert sums["dense/class_correct"].tolist() == [1, 0, 0]
    assert sums["pruned/top1"] == 0  # predictions 1, 0, 0
    assert sums["pruned/agree"] == 1
    assert sums["dense/agree"] == 3
    loss = math.log(1 + math.exp(-2) + math.exp(-1)) + math.log(math.exp(-1) + math.exp(2) + 1) + math.log(3)
    assert sums["dense/loss"].dtype == torch.float64
    assert sums["dense/loss"].item() == pytest.approx(loss, rel=1e-12)


def test_top5_is_among_the_five_largest():
    task = Evaluation({"a": Logits()}, num_classes=7)
    task.to(CPU)
    sums = task(rows([7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]).repeat(3, 1, 1, 1), torch.tensor([0, 4, 5]))
    assert (int(sums["a/top1"]), int(sums["a/top5"])) == (1, 2)
    assert "a/agree" not in sums


def test_sums_add_up_over_micro_batches_and_mean_what_they_say():
    task = Evaluation({"a": Logits()}, num_classes=3)
    task.to(CPU)
    parts = [
        task(rows([1.0, 0.0, 0.0], [0.0, 1.0, 0.0]), torch.tensor([0, 0])),
        task(rows([0.0, 0.0, 1.0]), torch.tensor([1])),
    ]
    metrics = summarise({key: parts[0][key] + parts[1][key] for key in parts[0]})["a"]
    assert (metrics.rows, metrics.top1, metrics.agreement) == (3, 1 / 3, None)
    assert metrics.class_accuracy == (0.5, 0.0, None)
    assert metrics.loss == pytest.approx(math.log(math.e + 2) - 1 / 3)


def test_task_survives_the_way_to_a_worker_and_leaves_models_in_their_mode():
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    task = pickle.loads(pickle.dumps(Evaluation({"a": model}, num_classes=2)))
    task.to(CPU)
    images, labels = torch.ones(2, 1, 2, 2), torch.tensor([0, 1])
    assert task(images, labels)["a/loss"] == task(images, labels)["a/loss"]  # dropout is off
    assert model.training


def test_what_cannot_be_counted_is_refused():
    task = Evaluation({"a": Logits()}, num_classes=3)
    task.to(CPU)
    with pytest.raises(ValueError, match="labels reach from 0 to 3, the models have 3 classes"):
        task(rows([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"model 'a' gives \(1, 2\) for 1 images of 3 classes"):
        task(rows([0.0, 0.0]), torch.tensor([0]))
    with pytest.raises(ArithmeticError, match="model 'a' gives NaN or Inf"):
        task(rows([0.0, float("nan"), 0.0]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"reference is 'b'. Known models: a"):
        Evaluation({"a": Logits()}, num_classes=3, reference="b")
    with pytest.raises(ValueError, match="at least one row"):
        summarise({"rows": torch.tensor(0), "class_rows": torch.zeros(3)})
