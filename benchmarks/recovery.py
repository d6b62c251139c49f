"""Recovery through Ray Train beside the same loop in one plain process: `python -m benchmarks.recovery --data ROWS.parquet`.

plain         training.loop.train in a process of its own, with as many threads as the workers have together, and their malloc settings
two_workers   execution.train.fit with two workers of one thread each: DDP over gloo, checkpoints, reports

Both train the same network with its teacher on the same global batches. Rates are those of the history between the first record and
the last; what comes before the first step and after the last is told by itself, as `outside_s`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import ray
import torch
import tyro
from torch import nn

from benchmarks.measuring import image_rows, in_fresh_process, versions
from pipeline.data.rows import Source
from pipeline.data.stream import Augmentation, TrainingOrder
from pipeline.execution.machine import keep_freed_memory
from pipeline.execution.pool import connect
from pipeline.execution.train import fit
from pipeline.models import zoo
from pipeline.stages.training import worker_batches
from pipeline.training.loop import Record, train
from pipeline.training.settings import TrainSettings

WORKERS = 2


def measure(
    data: str | None = None,
    model: str = "resnet50",
    size: int = 64,
    rows: int = 1536,
    batch_size: int = 256,
    turns: int = 3,
) -> dict[str, Any]:
    """Rows per second of both ways, the median of turns, and the median of the turns' ratios. Needs two cores.

    Args:
        data: Parquet file in Hugging Face's layout; None: made-up JPEGs.
        model: name in timm; its teacher is a copy of it.
        size: height and width of the decoded images in pixels.
        rows: of one epoch, which is one turn of each way.
        batch_size: rows in one step, over all workers.
    """
    found: dict[str, list[dict[str, float]]] = {"plain": [], "two_workers": []}
    with image_rows(data, rows) as source:
        training = Training(source, model, size, batch_size)
        connect(None, num_cpus=WORKERS + 1)
        try:
            for _ in range(turns):
                found["plain"].append(in_fresh_process(plain, training))
                found["two_workers"].append(training.through_ray())
        finally:
            ray.shutdown()
    rate, outside = (
        {name: statistics.median(one[key] for one in several) for name, several in found.items()}
        for key in ("rows_per_s", "outside_s")
    )
    ratios = [
        theirs["rows_per_s"] / own["rows_per_s"]
        for theirs, own in zip(found["two_workers"], found["plain"], strict=True)  # one after the other: machines drift
    ]
    return {
        "rows": rows,
        "batch_size": batch_size,
        **{f"{name}_rows_per_s": value for name, value in rate.items()},
        **{f"{name}_outside_s": value for name, value in outside.items()},
        "ratio_to_plain": statistics.median(ratios),
        "all_rows_per_s": {name: [one["rows_per_s"] for one in several] for name, several in found.items()},
        "versions": versions("torch", "ray", "timm"),
    }


class Training:
    """One epoch of recovery, to be done in two ways."""

    def __init__(self, source: Source, model: str, size: int, batch_size: int) -> None:
        self.source, self.model = source, model
        self.order = TrainingOrder(source.row_groups, WORKERS, batch_size, seed=0)
        self.augmentation = Augmentation(size=size)
        self.settings = TrainSettings(
            epochs=1,
            batch_size=batch_size,
            lr=0.01,
            ema_decay=0.99,
            distill_weight=0.7,
            log_every_steps=max(1, self.order.steps_per_epoch // 8),
        )

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return zoo.build(self.model)

    def batches(self, rank: int, size: int) -> Any:
        make = partial(worker_batches, self.source, self.order, self.augmentation, 1000, "stop", 0, 0)
        return make(rank, size)

    def through_ray(self) -> dict[str, float]:
        network, started = self.network(), time.time()
        with tempfile.TemporaryDirectory() as folder:
            result = fit(
                network,
                network,
                self.batches,
                self.settings,
                steps_per_epoch=self.order.steps_per_epoch,
                fingerprint="benchmark",
                directory=folder,
                num_workers=WORKERS,
            )
            ended = time.time()
        return _figures(result.history, ended - started)


def plain(training: Training) -> dict[str, float]:
    """In this process alone, with a directory for checkpoints as the workers have one."""
    torch.set_num_threads(WORKERS)
    keep_freed_memory()
    network, started = training.network(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            network,
            network,
            training.batches(0, 1),
            training.settings,
            steps_per_epoch=training.order.steps_per_epoch,
            checkpoint_dir=folder,
        )
        ended = time.time()
    return _figures(result.history, ended - started)


def _figures(history: list[Record], seconds: float) -> dict[str, float]:
    first, last = history[0], history[-1]
    rows = sum(record["rows"] for record in history[1:])
    return {
        "rows_per_s": rows / (last["seconds"] - first["seconds"]),
        "outside_s": seconds - last["seconds"],
    }


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
