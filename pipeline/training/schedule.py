"""Optimizer, learning rate per step and averaged weights: timm's and torch's own, with our choices in one place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from pipeline.training.settings import TrainSettings


def build_optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    """SGD with Nesterov momentum, or AdamW. Norms, biases and the model's own exceptions are not decayed."""
    own_exceptions: Any = getattr(model, "no_weight_decay", tuple)  # position embeddings, class tokens
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=own_exceptions())
    if settings.optimizer == "adamw":
        return AdamW(groups, lr=settings.lr, betas=(settings.momentum, 0.999))
    return SGD(groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0)


def build_schedule(
    optimizer: Optimizer, *, lr: float, min_lr: float, num_steps: int, warmup_steps: int
) -> CosineLRScheduler:
    """Learning rate of update t = 0 ... num_steps - 1, set by `step_update(t)` before the update.

    Warm-up: lr * (t + 1) / (warmup_steps + 1), so that no update is wasted at rate 0. Then half a cosine from lr to
    min_lr.

    Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017.
    """
    if not 0 <= warmup_steps < num_steps:
        raise ValueError(
            f"{warmup_steps} warm-up steps leave nothing of {num_steps}. Lower warmup_epochs or train longer."
        )
    return CosineLRScheduler(
        optimizer,
        t_initial=num_steps - warmup_steps,
        lr_min=min_lr,
        warmup_t=warmup_steps,
        warmup_lr_init=lr / (warmup_steps + 1),
        warmup_prefix=True,
        t_in_epochs=False,
    )


def sum_of_rates(schedule: CosineLRScheduler, steps: Iterable[int]) -> float:
    """Of the learning rates of updates `steps`. Leaves the optimizer with the last of them."""
    total = 0.0
    for step in steps:
        schedule.step_update(step)
        total += schedule.optimizer.param_groups[0]["lr"]
    return total


def build_ema(model: nn.Module, decay: float) -> ModelEmaV3:
    """Averaged weights and buffers (batch-norm statistics, too); `update(model, t)` after update t = 1, 2 ...

    The decay of update t is min(decay, 1 - t^(-2/3)): 0 at first (a copy), 0.78 at 10, 0.95 at 100, 0.99 at 1000. A
    run of two hundred steps therefore averages its last few dozen, not its random start.
    """
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=1.0, warmup_power=2 / 3)
