"""ResNet-152 on ImageNet with half of its parameters.

    python -m jobs.prune_resnet152 --data.train s3://bucket/imagenet/train --data.val s3://bucket/imagenet/val --run-dir s3://bucket/runs/r152
    ray job submit --address http://head:8265 --working-dir . -- python -m jobs.prune_resnet152 --data.train ... --run-dir ... --workers.num-workers 8

Any field of RunConfig can be given (`--help` lists them). The same command resumes. The defaults are meant for 8 GPUs: batch 1024,
SGD at 0.4 with a cosine over 30 epochs, distilled from the dense network. Without a GPU the workers are CPU processes with gloo.
"""

from __future__ import annotations

from typing import Any

from pipeline.cli import run_job
from pipeline.config import (
    BudgetConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    SparsifyConfig,
    TrainingConfig,
)

RECIPE: dict[str, Any] = {
    "batch_size": 1024,
    "lr": 0.4,
    "warmup_epochs": 1,
    "distill_weight": 0.7,
    "ema_decay": 0.9998,
    "loader_processes": 8,
}
"""Of all training after the dense network's own."""


def config() -> RunConfig:
    return RunConfig(
        run_dir="runs/resnet152",
        model=ModelConfig(name="resnet152.tv2_in1k", pretrained=True),
        train=TrainingConfig(epochs=0, batch_size=1024, lr=0.5, weight_decay=5e-5, warmup_epochs=5),
        sparsify=SparsifyConfig(**RECIPE),
        score=ScoreConfig(criterion="taylor", num_rows=50_000, rows_per_unit=256, micro_batch=64),
        budget=BudgetConfig(params=0.5),
        recover=TrainingConfig(epochs=30, **RECIPE),
        evaluate=EvaluateConfig(batch_size=256),
    )


if __name__ == "__main__":
    run_job(config(), __doc__)
