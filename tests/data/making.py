"""Small data sets for the tests of this room."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.data.source import Row, RowGroups, RowPlace, Source, layout

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def image(value: int, size: tuple[int, int] = (12, 12), kind: str = "PNG", mode: str = "RGB") -> bytes:
    """An encoded image with a gradient and, in its red channel, `value`."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = value
    pixels[..., 1] = np.linspace(0, 255, width, dtype=np.uint8)[None, :]
    pixels[..., 2] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def write_parquet(
    path: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any] | pa.Array,
    rows_per_group: int = 4,
    *,
    plain: bool = False,
    names: tuple[str, str] = ("image", "label"),
) -> Path:
    """Hugging Face's layout, or a plain binary column."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = (
        images
        if plain
        else [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    )
    label_array = labels if isinstance(labels, pa.Array) else pa.array(labels, pa.int64())
    table = pa.table({names[0]: pa.array(values, pa.binary() if plain else STRUCT), names[1]: label_array})
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def write_rows(path: Path, num_rows: int, rows_per_group: int = 4, first: int = 0) -> Path:
    """Row i has red value i and label i modulo 10."""
    rows = range(first, first + num_rows)
    return write_parquet(path, [image(i % 256) for i in rows], [i % 10 for i in rows], rows_per_group)


def row_groups(*num_rows: int) -> RowGroups:
    """One file with row groups of these sizes."""
    return layout([num_rows])


class FakeSource(Source):
    """Rows that are numbers: row i has label i modulo 10 and the number itself as its image. Counts what is read."""

    def __init__(self, groups: RowGroups) -> None:
        super().__init__(groups, "fake")
        self.loads: list[int] = []

    def load(self, file: int, row_group: int) -> FakeGroup:
        self.loads.append(row_group)
        return FakeGroup(int(self.row_groups.starts[row_group]), row_group)


class FakeGroup:
    def __init__(self, first: int, row_group: int) -> None:
        self.first, self.row_group = first, row_group

    def rows(self, start: int, stop: int) -> list[Row]:
        numbers = range(self.first + start, self.first + stop)
        return [Row(str(i).encode(), i % 10, RowPlace("fake", self.row_group, i)) for i in numbers]
