"""Peak memory of one worker while the rows grow a hundredfold: `python -m benchmarks.memory --data ROWS.parquet`.

Each size runs in a fresh process: channel statistics of a ResNet-18 from Parquet, by one worker, without Ray. The rows are the same
few, again and again, and commits come often, so that whatever is kept for each row, row group, unit or commit shows.
"""

from __future__ import annotations

import json
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.measuring import image_rows, in_fresh_process, peak_memory, rows_of, versions, write_rows
from pipeline.data.batches import Decoder
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from pipeline.execution.drive import LocalPool, run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.worker import Pass
from pipeline.models import zoo
from pipeline.models.trace import propagate
from pipeline.saliency.statistics import GateStatistics

ROW_GROUP = 64
"""Rows in a row group and in a unit."""


def measure(
    data: str | None = None, rows: tuple[int, ...] = (64, 640, 6400), model: str = "resnet18", size: int = 32
) -> dict[str, Any]:
    """Peak resident memory in MB for each number of rows, and the largest over the smallest of them.

    Args:
        data: Parquet file in Hugging Face's layout, whose first 64 rows are repeated; None: made-up JPEGs.
        rows: sizes of the data set.
        model: name in timm.
        size: height and width of the decoded images in pixels.
    """
    peaks: dict[int, dict[str, float]] = {}
    with image_rows(data, ROW_GROUP, size=2 * size) as few, tempfile.TemporaryDirectory() as folder:
        encoded = [(row.image, row.label) for row in rows_of(few)]
        for number in rows:
            path = write_rows(Path(folder) / f"{number}.parquet", islice(cycle(encoded), number), ROW_GROUP)
            peaks[number] = in_fresh_process(_score, str(path), model, size)
    values = [peak["peak_mb"] for peak in peaks.values()]
    return {
        "rows": {str(number): peak for number, peak in peaks.items()},
        "largest_over_smallest": max(values) / min(values),
        "versions": versions("torch", "pyarrow"),
    }


def _score(path: str, model: str, size: int) -> dict[str, float]:
    torch.manual_seed(0)
    network, source = zoo.build(model), open_source(path)
    units = Units(source.row_groups, ROW_GROUP)
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        work = Pass(
            task=GateStatistics(network, propagate(network, torch.zeros(1, 3, size, size))),
            source=source,
            units=units,
            decoder=Decoder(size),
            ledger=Ledger(folder, len(units), "benchmark"),
            grid=None,
            micro_batch=ROW_GROUP // 2,
            num_classes=1000,
            on_bad_row="stop",
        )
        result = run_pass(work, LocalPool(), commit_interval_s=0.5)
    assert result.rows == source.num_rows
    return {**peak, "commits": result.commits}


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
