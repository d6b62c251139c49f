"""Scoring one micro-batch beside a training step's forward and backward, one thread: `python -m benchmarks.scoring --model resnet152`.

plain    forward and backward with the gradients of all weights, in eval mode, channels_last
gates    the channel-gate statistics of every group
weights  the same, and the gradient statistics of every weight, rounded to their grid and added up

Each is one unit: what a unit costs beside its micro-batches is in it. The least that gates can cost is about 0.67 of plain: a backward
without weight gradients is half of one with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import tyro
from torch.nn import functional as F

from benchmarks.measuring import in_turns, one_thread, versions
from pipeline.data.units import STRIDES
from pipeline.models import zoo
from pipeline.models.trace import propagate
from pipeline.saliency.exact import ExactSums, Grid, magnitudes
from pipeline.saliency.statistics import GateStatistics


def measure(model: str = "resnet50", size: int = 224, rows: int = 16, turns: int = 3) -> dict[str, Any]:
    """Median seconds for one row of each way, measured in turns, and their ratios to plain.

    Args:
        model: name in timm.
        size: height and width of the images in pixels.
        rows: of the micro-batch.
        turns: of which the median counts, after one to warm up.
    """
    with one_thread():
        images = torch.randn(rows, 3, size, size).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(1000, (rows,))
        ways = {
            "plain": _plain(model, images, labels),
            "gates": _scored(model, images, labels, weights=False),
            "weights": _scored(model, images, labels, weights=True),
        }
        seconds = {name: value / rows for name, value in in_turns(ways, turns).items()}
    return {
        "model": model,
        "size": size,
        "rows": rows,
        **{f"{name}_s_per_row": value for name, value in seconds.items()},
        "gates_ratio": seconds["gates"] / seconds["plain"],
        "weights_ratio": seconds["weights"] / seconds["plain"],
        "versions": versions("torch", "timm"),
    }


def _plain(name: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    network = zoo.build(name).eval().to(memory_format=torch.channels_last)

    def work() -> None:
        network.zero_grad()
        F.cross_entropy(network(images), labels, reduction="sum").backward()

    return work


def _scored(name: str, images: torch.Tensor, labels: torch.Tensor, *, weights: bool) -> Callable[[], None]:
    network = zoo.build(name)
    task = GateStatistics(network, propagate(network, torch.zeros(1, *images.shape[1:])), weights=weights)
    task.to(torch.device("cpu"), torch.channels_last)
    task.check(images[:3], labels[:3])
    pilot = magnitudes(task(images, labels) | task.collect(), task.segments)
    sums = ExactSums(Grid.from_pilot(pilot, num_addends=1000, segments=task.segments))

    def work() -> None:
        sums.add(task(images, labels) | task.collect(), STRIDES, task.nested)

    return work


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
