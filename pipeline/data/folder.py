"""Rows in a directory with one subdirectory of images for each class; the sorted names of the classes are the labels.

The order of the rows is that of a hash of their names, not the alphabet's: files of one class lie together on disk,
and every range of rows (a unit, a window of the training order) should be a fair sample of all classes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from pipeline.artifacts import file_system, sha256_of
from pipeline.data.places import Files
from pipeline.data.source import DataError, Row, RowGroups, RowPlace, Source

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
ROWS_PER_GROUP = 256
"""A virtual row group: what a unit or a window may be a part of."""


def open_folder(files: Files) -> FolderSource:
    """A source over images in class directories, from their names and sizes alone."""
    loose = [name for name in files.names if "/" not in name]
    if loose:
        raise DataError(
            f"{files.root}: {len(loose)} images lie outside class directories, the first: {loose[0]}. "
            "Expected ROOT/CLASS/IMAGE; the sorted class names become the labels 0, 1, ..."
        )
    classes = tuple(sorted({name.split("/")[0] for name in files.names}))
    order = sorted(range(len(files.names)), key=lambda i: hashlib.sha256(files.names[i].encode()).digest())
    ordered = Files(files.root, tuple(files.names[i] for i in order), tuple(files.sizes[i] for i in order))
    labels = np.searchsorted(np.array(classes), np.array([name.split("/")[0] for name in ordered.names]))
    num_groups = -(-len(order) // ROWS_PER_GROUP)
    num_rows = np.full(num_groups, ROWS_PER_GROUP, dtype=np.int64)
    num_rows[-1] = len(order) - ROWS_PER_GROUP * (num_groups - 1)
    return FolderSource(
        row_groups=RowGroups(np.zeros(num_groups, np.int32), np.arange(num_groups, dtype=np.int32), num_rows),
        fingerprint=sha256_of(["folder", list(zip(ordered.names, ordered.sizes, strict=True))]),
        files=ordered,
        classes=classes,
        labels=labels.astype(np.int32),
    )


@dataclass(frozen=True)
class FolderGroup:
    """A range of image files; each is read when it is asked for."""

    files: Files
    labels: np.ndarray
    row_group: int
    num_rows: int

    def rows(self, start: int, stop: int) -> list[Row]:
        if not 0 <= start <= stop <= self.num_rows:
            raise DataError(
                f"{self.files.root}: rows {start}..{stop} asked of row group {self.row_group}, which has "
                f"{self.num_rows}."
            )
        filesystem, inner = file_system(self.files.root)
        first = self.row_group * ROWS_PER_GROUP
        rows = []
        for index in range(first + start, first + stop):
            with filesystem.open_input_file(f"{inner.rstrip('/')}/{self.files.names[index]}") as file:
                image = file.read()
            rows.append(Row(image, int(self.labels[index]), RowPlace(self.files.path(index), self.row_group, index)))
        return rows


@dataclass(eq=False)
class FolderSource(Source):
    """Rows of an image folder, in virtual row groups."""

    files: Files = field(repr=False)
    classes: tuple[str, ...]
    """Names of the labels."""
    labels: np.ndarray = field(repr=False)
    """int32 [num_rows]."""

    def load(self, file: int, row_group: int) -> FolderGroup:
        return FolderGroup(self.files, self.labels, row_group, int(self.row_groups.num_rows[row_group]))


def require_same_classes(train: Source, val: Source) -> None:
    """Two image folders number their classes each by itself: with other names, a label would mean two things."""
    if isinstance(train, FolderSource) and isinstance(val, FolderSource) and train.classes != val.classes:
        odd = sorted({*train.classes} ^ {*val.classes})
        raise DataError(
            f"{train.files.root} has {len(train.classes)} classes, {val.files.root} has {len(val.classes)}: only one of the two has "
            f"{', '.join(odd[:5])}. Labels are the sorted names of the classes, so both folders need the same ones (an empty "
            "class directory does not count)."
        )
