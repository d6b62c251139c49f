"""The whole way in about three minutes on two CPU cores, no network: scikit-learn's digits and a small ResNet.

    python -m jobs.prune_demo

The digits become PNG bytes in Parquet, as images lie in ImageNet's files; the network is trained by the project's own trainer, then
scored, cut to half its MACs, recovered, evaluated and reported. The same command resumes; `--run-dir` chooses the place.
"""

from __future__ import annotations

import io
import os
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.cli import run_job
from pipeline.config import (
    BudgetConfig,
    CalibrateConfig,
    DataConfig,
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    SparsifyConfig,
    TrainingConfig,
    WorkersConfig,
)

DATA_DIR = os.path.expanduser("~/.cache/gradient-pruning-pipeline/digits")


def write_digits(directory: str) -> tuple[str, str]:
    """scikit-learn's 1,797 digits as 32 x 32 PNG in Parquet, the last fifth for validation. Returns both paths."""
    paths = (os.path.join(directory, "train.parquet"), os.path.join(directory, "val.parquet"))
    if all(map(os.path.exists, paths)):
        return paths
    from sklearn.datasets import load_digits

    digits = load_digits()
    rows = []
    for pixels, label in zip(digits.images, digits.target, strict=True):
        image = Image.fromarray((pixels * 255 / 16).astype("uint8")).resize((32, 32), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": int(label)})
    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.int64())])
    os.makedirs(directory, exist_ok=True)
    split = len(rows) * 4 // 5
    for path, part in zip(paths, (rows[:split], rows[split:]), strict=True):
        pq.write_table(pa.Table.from_pylist(part, schema=schema), f"{path}.{os.getpid()}", row_group_size=256)
        os.replace(f"{path}.{os.getpid()}", path)
    return paths


RECIPE: dict[str, Any] = {
    "batch_size": 64,
    "lr": 0.02,
    "warmup_epochs": 0.5,
    "ema_decay": 0.98,
    "distill_weight": 0.7,
    "crop_scale": (0.7, 1.0),
}
"""Of all training after the dense network's own."""


def config(train: str, val: str) -> RunConfig:
    return RunConfig(
        run_dir="runs/demo",
        model=ModelConfig(name="resnet10t", pretrained=False, num_classes=10),
        data=DataConfig(train=train, val=val, image_size=32, crop_fraction=1.0),
        train=TrainingConfig(epochs=8, batch_size=64, lr=0.05, warmup_epochs=1, ema_decay=0.98, crop_scale=(0.7, 1.0)),
        sparsify=SparsifyConfig(**RECIPE),
        score=ScoreConfig(criterion="taylor", rows_per_unit=64, micro_batch=64),
        budget=BudgetConfig(macs=0.5),
        calibrate=CalibrateConfig(batches=10),
        recover=TrainingConfig(epochs=4, **RECIPE),
        evaluate=EvaluateConfig(batch_size=64, latency_batch=32),
        workers=WorkersConfig(num_workers=2, commit_interval_s=2.0),
    )


if __name__ == "__main__":
    run_job(config(*write_digits(DATA_DIR)), __doc__)
