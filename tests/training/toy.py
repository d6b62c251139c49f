"""The smallest network and data on which training can go wrong: a batch norm, a dropout, 40 rows of 4 classes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pipeline.training.settings import TrainSettings

ROWS, BATCH, CLASSES = 40, 8, 4
STEPS = ROWS // BATCH


def toy_model(seed: int = 0, dropout: float = 0.2) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(24, CLASSES),
        )


def toy_settings(**changes: object) -> TrainSettings:
    values: dict[str, object] = {
        "epochs": 3,
        "batch_size": BATCH,
        "lr": 0.1,
        "checkpoint_every_steps": 4,
        "log_every_steps": 1,
    }
    return TrainSettings(**(values | changes))  # type: ignore[arg-type]


class Killed(Exception):
    """Stands for the death of a worker."""


class ToyBatches:
    """Global batches by (epoch, step); `shares[rank]` rows of each go to a rank. Dies before global step `dies_at`."""

    def __init__(self, rank: int = 0, shares: tuple[int, ...] = (BATCH,), dies_at: int | None = None) -> None:
        self.first, self.count, self.dies_at = sum(shares[:rank]), shares[rank], dies_at
        generator = torch.Generator().manual_seed(7)
        self.images = torch.randn(ROWS, 3, 6, 6, generator=generator)
        self.labels = torch.arange(ROWS) % CLASSES
        self.images[:, 0] += self.labels[:, None, None]

    def __call__(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        for step in range(start_step, STEPS):
            if epoch * STEPS + step == self.dies_at:
                raise Killed
            rows = order[step * BATCH + self.first :][: self.count]
            yield self.images[rows], self.labels[rows]


def same_tensors(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names and bits."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def without_times(history: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in record.items() if k not in ("seconds", "rows_per_s")} for record in history]
