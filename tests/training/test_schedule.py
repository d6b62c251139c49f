from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pipeline.training.schedule import build_ema, build_optimizer, build_schedule
from tests.training.toy import toy_model, toy_settings


def rates(num_steps: int, warmup_steps: int, lr: float, min_lr: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = build_schedule(optimizer, lr=lr, min_lr=min_lr, num_steps=num_steps, warmup_steps=warmup_steps)
    values = []
    for step in range(num_steps):
        schedule.step_update(step)
        values.append(optimizer.param_groups[0]["lr"])
    return values


def test_warmup_is_linear_and_meets_the_cosine_at_the_peak():
    # 3 warm-up steps: 1/4, 2/4, 3/4 of 0.8; then 0.8 * (1 + cos(pi * t / 4)) / 2 for t = 0 ... 3.
    half_root = math.sqrt(0.5)
    expected = [0.2, 0.4, 0.6, 0.8, 0.4 * (1 + half_root), 0.4, 0.4 * (1 - half_root)]
    assert rates(7, 3, lr=0.8, min_lr=0.0) == pytest.approx(expected)


def test_cosine_ends_at_min_lr():
    assert rates(2, 0, lr=1.0, min_lr=0.5) == pytest.approx([1.0, 0.75])  # halfway; min_lr itself would be step 2


def test_warmup_must_leave_steps():
    with pytest.raises(ValueError, match="5 warm-up steps leave nothing of 5"):
        rates(5, 5, lr=1.0, min_lr=0.0)


def test_norms_and_biases_are_not_decayed():
    model = toy_model()
    optimizer = build_optimizer(model, toy_settings(weight_decay=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay == {"0.weight": 0.5, "1.weight": 0.0, "1.bias": 0.0, "6.weight": 0.5, "6.bias": 0.0}


def test_a_models_own_exceptions_are_not_decayed():
    class WithToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1, 1, 4))

        def no_weight_decay(self) -> set[str]:
            return {"token"}

    optimizer = build_optimizer(WithToken(), toy_settings(weight_decay=0.5, optimizer="adamw"))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0]


def test_ema_decay_warms_up_and_covers_batch_norm_statistics():
    model = nn.BatchNorm1d(1)
    ema = build_ema(model, decay=0.6)
    model.running_mean.fill_(8.0)
    ema.update(model, step=1)  # decay 0: a copy
    assert ema.module.running_mean.item() == 8.0
    model.running_mean.fill_(0.0)
    ema.update(model, step=8)  # 1 - 8^(-2/3) = 0.75 is above the limit of 0.6
    assert ema.module.running_mean.item() == pytest.approx(4.8)
    model.num_batches_tracked.fill_(5)
    ema.update(model, step=2)  # 1 - 2^(-2/3) = 0.37
    assert ema.module.running_mean.item() == pytest.approx(4.8 * (1 - 2 ** (-2 / 3)))
    assert ema.module.num_batches_tracked.item() == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_epochs": 3}, r"warmup_epochs \(3\) must lie between 0 and epochs \(3\)"),
        ({"optimizer": "lion"}, "optimizer is 'lion'. Known: sgd, adamw"),
        ({"min_lr": 0.2}, r"min_lr \(0.2\) must lie between 0 and lr \(0.1\)"),
        ({"distill_weight": 1.5}, "distill_weight"),
        ({"clip_grad_norm": 0.0}, "None for no limit"),
        ({"rewind_epochs": 2}, r"rewind_epochs \(2\) must be at least epochs \(3\) and the warm-up \(0.0\)"),
        ({"rewind_epochs": 3.5, "warmup_epochs": 1}, r"rewind_epochs \(3.5\) must be at least"),
        ({"ema_decay": 1.0}, r"ema_decay \(1.0\) must lie in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        toy_settings(**change)
