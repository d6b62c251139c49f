"""A task that sparse training can solve in a second: 160 rows of 4 classes, a network with more channels than it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from pipeline.models.graph import Graph
from pipeline.pruning.trials import trace
from pipeline.training.loop import TrainResult, train
from pipeline.training.policy import MakePolicy, Training
from pipeline.training.settings import TrainSettings

ROWS, BATCH, CLASSES = 160, 16, 4
STEPS = ROWS // BATCH


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(16, CLASSES),
        )


WEIGHTS = ("0.weight", "3.weight")


@cache
def graph() -> Graph:
    return trace(network(), torch.zeros(1, 3, 6, 6))


@cache
def rows() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    labels = torch.arange(ROWS) % CLASSES
    images = torch.randn(ROWS, 3, 6, 6, generator=generator)
    images[:, 0] += labels[:, None, None] - 1.5
    images[:, 1] += (labels % 2)[:, None, None]
    return images, labels


class Batches:
    """This rank's share of each step. Dies before global step `dies_at`."""

    def __init__(self, rank: int = 0, size: int = 1, dies_at: int | None = None) -> None:
        self.rank, self.size, self.dies_at = rank, size, dies_at

    def __call__(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = rows()
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        for step in range(start_step, STEPS):
            if epoch * STEPS + step == self.dies_at:
                raise KeyboardInterrupt
            own = order[step * BATCH : (step + 1) * BATCH][self.rank :: self.size]
            yield images[own], labels[own]


def settings(**changes: object) -> TrainSettings:
    values: dict[str, object] = {"epochs": 8, "batch_size": BATCH, "lr": 0.05, "weight_decay": 0.0}
    values |= {"log_every_steps": 5, "checkpoint_every_steps": 10, "ema_decay": 0.9}
    return TrainSettings(**(values | changes))  # type: ignore[arg-type]


def trained(policies: Sequence[MakePolicy], *, batches: Batches | None = None, **changes: object) -> TrainResult:
    directory = changes.pop("directory", None)
    return train(
        network(),
        None,
        batches or Batches(),
        settings(**changes),
        steps_per_epoch=STEPS,
        policies=policies,
        checkpoint_dir=None if directory is None else str(directory),
        fingerprint="sparse",
    )


def accuracy(state: dict[str, Tensor]) -> float:
    model = network()
    model.load_state_dict(state)
    images, labels = rows()
    with torch.no_grad():
        return float((model.eval()(images).argmax(1) == labels).double().mean())


def on(model: nn.Module, num_steps: int = 8, lr_sum: float = 1.0, **options: float) -> Training:
    """A training of one rank with plain SGD, for tests that take single steps."""
    return Training(model, torch.optim.SGD(model.parameters(), lr=0.1, **options), num_steps, lr_sum)


class Line(nn.Module):
    """One weight of three numbers, as a linear layer without bias: what golden tests are worked out for."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([list(values)]))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)
