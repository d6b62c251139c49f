"""What a training run is: the numbers that decide its result, and those that only decide how often it reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

OPTIMIZERS = ("sgd", "adamw")
AMP_MODES = ("auto", "bf16", "off")
CADENCE = ("checkpoint_every_steps", "log_every_steps")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSettings:
    """Settings of `train`. Rates hold for the global batch; nothing here depends on the number of workers."""

    epochs: int
    batch_size: int
    """Rows in one step, over all workers."""
    lr: float
    """Peak learning rate at this batch_size."""
    min_lr: float = 1e-5
    """Where the cosine ends."""
    warmup_epochs: float = 0.0
    """Linear warm-up; may be a fraction of an epoch."""
    rewind_epochs: float | None = None
    """Length of a schedule of which these epochs are the last: learning-rate rewinding. None: one of their own."""
    momentum: float = 0.9
    """Nesterov momentum of SGD, beta1 of AdamW."""
    weight_decay: float = 2e-5
    """Not applied to norms, biases and what the model's own `no_weight_decay()` names."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    """Decay per step of the averaged weights, which are then the result; warmed up for short runs; 0 = off."""
    distill_weight: float = 0.0
    """Share of the loss that follows the teacher's logits."""
    distill_temperature: float = 2.0
    amp: Literal["auto", "bf16", "off"] = "auto"
    """`auto` is bf16 on CUDA and off elsewhere."""
    channels_last: bool = True
    """Faster on GPUs, and on CPUs above all where convolutions are depthwise."""
    clip_grad_norm: float | None = None
    """Largest global norm of a gradient; None = no limit."""
    seed: int = 0
    """Of dropout and drop path. The order of the rows and their augmentation have their own."""
    checkpoint_every_steps: int = 500
    log_every_steps: int = 50

    def __post_init__(self) -> None:
        for name, value, known in (("optimizer", self.optimizer, OPTIMIZERS), ("amp", self.amp, AMP_MODES)):
            if value not in known:
                raise ValueError(f"{name} is {value!r}. Known: {', '.join(known)}.")
        for name in ("epochs", "batch_size", "checkpoint_every_steps", "log_every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1.")
        if not 0 <= self.warmup_epochs < (self.rewind_epochs or self.epochs):
            raise ValueError(
                f"warmup_epochs ({self.warmup_epochs}) must lie between 0 and epochs ({self.epochs}): the cosine comes "
                "after the warm-up. Lower warmup_epochs or train longer."
            )
        if self.rewind_epochs is not None and self.rewind_epochs < self.epochs + self.warmup_epochs:
            raise ValueError(
                f"rewind_epochs ({self.rewind_epochs}) must be at least epochs ({self.epochs}) and the warm-up ({self.warmup_epochs}): these "
                "epochs are the end of that schedule. Raise it, or leave it out."
            )
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise ValueError(f"min_lr ({self.min_lr}) must lie between 0 and lr ({self.lr}), and lr above 0.")
        for name in ("momentum", "label_smoothing", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must lie in [0, 1).")
        if not 0 <= self.distill_weight <= 1 or self.distill_temperature <= 0:
            raise ValueError(
                f"distill_weight ({self.distill_weight}) must lie in [0, 1] and distill_temperature "
                f"({self.distill_temperature}) above 0."
            )
        if self.clip_grad_norm is not None and self.clip_grad_norm <= 0:
            raise ValueError(f"clip_grad_norm ({self.clip_grad_norm}) must be above 0, or None for no limit.")

    def identity(self) -> dict[str, Any]:
        """Every field that changes the result, as plain values: part of a checkpoint's identity."""
        return {name: value for name, value in asdict(self).items() if name not in CADENCE}

    def uses_bf16(self, device: torch.device) -> bool:
        return self.amp == "bf16" or (self.amp == "auto" and device.type == "cuda")

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format
