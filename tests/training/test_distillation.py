from __future__ import annotations

import math

import pytest
import torch

from pipeline.training.distillation import distillation_loss, label_loss, student_loss


def test_distillation_of_hand_worked_logits():
    # T = 2: teacher softmax([2 ln 3, 0] / 2) = (3/4, 1/4), student softmax(0, 0) = (1/2, 1/2).
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert distillation_loss(torch.zeros(1, 2), teacher, 2.0).item() == pytest.approx(4 * kl, rel=1e-6)


def test_distillation_is_a_mean_over_rows_and_zero_for_equal_logits():
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
    assert distillation_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-7)
    other = torch.tensor([[1.0, 0.0, 0.0]])
    one = distillation_loss(other, torch.zeros(1, 3), 1.0)
    two = distillation_loss(torch.cat([other, other]), torch.zeros(2, 3), 1.0)
    assert two.item() == pytest.approx(one.item())


def test_smoothed_labels_of_hand_worked_logits():
    # softmax = (3/4, 1/4); smoothing 0.2: 0.8 * -ln 3/4 + 0.2 * mean(-ln 3/4, -ln 1/4).
    logits = torch.tensor([[math.log(3), 0.0]])
    expected = 0.8 * math.log(4 / 3) + 0.2 * (math.log(4 / 3) + math.log(4)) / 2
    assert label_loss(logits, torch.tensor([0]), 0.2).item() == pytest.approx(expected, rel=1e-6)


def test_labels_may_be_distributions():
    logits = torch.tensor([[math.log(3), 0.0]])
    expected = 0.5 * math.log(4 / 3) + 0.5 * math.log(4)
    assert label_loss(logits, torch.tensor([[0.5, 0.5]]), 0.1).item() == pytest.approx(expected, rel=1e-6)


def test_student_loss_weighs_labels_and_teacher():
    logits, labels, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([1]), torch.tensor([[0.0, 2.0]])
    hard, soft = label_loss(logits, labels, 0.0), distillation_loss(logits, teacher, 2.0)
    mixed = student_loss(logits, labels, teacher, smoothing=0.0, weight=0.25, temperature=2.0)
    assert mixed.item() == pytest.approx(0.75 * hard.item() + 0.25 * soft.item())
    assert student_loss(logits, labels, None, smoothing=0.0, weight=0.25, temperature=2.0).item() == hard.item()


def test_teacher_with_other_classes_is_refused():
    with pytest.raises(ValueError, match=r"student has logits of shape \(1, 3\), its teacher \(1, 5\)"):
        distillation_loss(torch.zeros(1, 3), torch.zeros(1, 5), 1.0)
