"""Rows decoded for evaluation per second of one thread, beside the usual ways: `python -m benchmarks.decode --data ROWS.parquet`.

ours         Parquet, Decoder, micro-batches, all in the calling thread
timm         PIL and timm's evaluation transform in torch's DataLoader, in the calling thread; its rows are in memory already
timm_worker  the same in one loader process
torchvision  torchvision's own decoder and transforms of tensors in a DataLoader, in the calling thread

Twice: the images as they are stored, and at ImageNet's usual 500 x 375, to which they are enlarged and encoded again.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torchvision
import tyro
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from benchmarks.measuring import image_rows, in_turns, jpeg, one_thread, rows_of, versions, write_rows
from pipeline.data.batches import Decoder, unit_batches
from pipeline.data.rows import Row, Source, open_source
from pipeline.data.units import Units

CROP = 0.875
LARGE = (500, 375)
"""Width and height in pixels of the typical ImageNet file."""


def measure(
    data: str | None = None, rows: int = 512, batch: int = 32, size: int = 224, turns: int = 5
) -> dict[str, Any]:
    """Rows per second of each way, measured in turns.

    Args:
        data: Parquet file in Hugging Face's layout; None: made-up JPEGs.
        rows: decoded per turn.
        batch: rows in one batch.
        size: height and width of the decoded images in pixels.
        turns: of which the median counts, after one to warm up.
    """
    with one_thread(), image_rows(data, rows) as stored, tempfile.TemporaryDirectory() as folder:
        enlarged = ((_enlarge(row.image), row.label) for row in rows_of(stored))
        large = open_source(str(write_rows(Path(folder) / "large.parquet", enlarged)))
        return {
            "rows": rows,
            "stored": _compare(stored, batch, size, turns),
            "large": _compare(large, batch, size, turns),
            "versions": versions("torch", "torchvision", "timm", "pillow"),
        }


def _compare(source: Source, batch: int, size: int, turns: int) -> dict[str, float]:
    decoder, units, encoded = Decoder(size, crop_pct=CROP), Units(source.row_groups, batch), list(rows_of(source))
    by_timm, by_torchvision = EncodedRows(encoded, timm_way(size)), EncodedRows(encoded, torchvision_way(size))

    def ours() -> None:
        for unit in units:
            for _ in unit_batches(source, unit, decoder, micro_batch=batch, num_classes=1000, threads=0):
                pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision announces at every image that its decoders will move
        seconds = in_turns(
            {
                "ours": ours,
                "timm": exhaust(DataLoader(by_timm, batch)),
                "timm_worker": exhaust(DataLoader(by_timm, batch, num_workers=1, persistent_workers=True)),
                "torchvision": exhaust(DataLoader(by_torchvision, batch)),
            },
            turns,
        )
    std = torch.tensor(decoder.std).view(3, 1, 1)
    differences = [(decoder(row.image) - by_timm.transform(row.image)) * std * 255 for row in encoded[:64]]
    return {
        **{f"{name}_rows_per_s": len(encoded) / value for name, value in seconds.items()},
        **{f"speed_ratio_{name}": value / seconds["ours"] for name, value in seconds.items() if name != "ours"},
        "encoded_bytes_per_row": statistics.mean(len(row.image) for row in encoded),
        "largest_difference_to_timm_in_levels": max(float(levels.abs().max()) for levels in differences),
    }


class EncodedRows(Dataset[tuple[Tensor, int]]):
    """Rows in memory for torch's DataLoader; each is transformed when it is asked for."""

    def __init__(self, rows: list[Row], transform: Callable[[bytes], Tensor]) -> None:
        self.rows, self.transform = rows, transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.rows[index].image), self.rows[index].label


def timm_way(size: int) -> Callable[[bytes], Tensor]:
    transform = create_transform(size, is_training=False, interpolation="bicubic", crop_pct=CROP)
    return lambda data: transform(Image.open(io.BytesIO(data)).convert("RGB"))


def torchvision_way(size: int) -> Callable[[bytes], Tensor]:
    transform = v2.Compose(
        [
            v2.Resize(int(size / CROP), v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
    )
    rgb = torchvision.io.ImageReadMode.RGB
    return lambda data: transform(
        torchvision.io.decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), rgb)
    )


def exhaust(loader: Iterable[Any]) -> Callable[[], None]:
    def work() -> None:
        for _ in loader:
            pass

    return work


def _enlarge(data: bytes) -> bytes:
    return jpeg(Image.open(io.BytesIO(data)).convert("RGB").resize(LARGE, Image.BICUBIC), quality=92)


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
