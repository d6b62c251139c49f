"""Rows in Parquet files, in the layout of Hugging Face (struct<bytes, path>) or with a plain binary column."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs as arrow_fs

from pipeline.artifacts import file_system, sha256_of, storage
from pipeline.data.places import Files
from pipeline.data.source import DataError, Row, RowPlace, Source, layout

MAGIC = b"PAR1"
TAIL_BYTES = 64 * 1024
"""Read first from the end of each file; nearly every footer fits, so that opening costs one request."""
FOOTER_THREADS = 16
OPEN_FILES = 8
"""Files that one process keeps open."""


@dataclass(frozen=True)
class Footer:
    """What the end of a Parquet file says."""

    num_rows: tuple[int, ...]
    """Of each row group."""
    schema: pa.Schema
    sha256: str
    """Of the footer's bytes as they are stored."""


def read_footer(filesystem: arrow_fs.FileSystem, inner: str, path: str, size: int) -> Footer:
    """Read the footer alone. Raises DataError, with the path, for what is not a Parquet file."""
    if size == 0:
        raise DataError(f"{path} is empty (0 bytes). Remove it or write it again.")
    with filesystem.open_input_file(inner) as file:
        tail = file.read_at(min(size, TAIL_BYTES), max(0, size - TAIL_BYTES))
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] != MAGIC or length > size:
            start = file.read_at(min(size, 16), 0)
            hint = (
                "It was cut off: copy or write it again."
                if start[:4] == MAGIC
                else "Give Parquet files, or a directory with one subdirectory of images for each class."
            )
            raise DataError(
                f"{path} ({size} bytes) is not a Parquet file: it begins with {start!r} and does not end with "
                f"{MAGIC!r}. {hint}"
            )
        if length > len(tail):
            tail = file.read_at(length, size - length)
    footer = tail[-length:]
    try:
        reader = pq.ParquetFile(pa.BufferReader(MAGIC + footer))
        counts = tuple(reader.metadata.row_group(i).num_rows for i in range(reader.metadata.num_row_groups))
        return Footer(counts, reader.schema_arrow, hashlib.sha256(footer).hexdigest())
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: its Parquet footer cannot be read ({error}). Copy or write the file again."
        ) from error


def open_parquet(files: Files, image_column: str, label_column: str) -> ParquetSource:
    """A source over Parquet files: reads every footer, in parallel, and nothing else."""

    def footer(index: int) -> Footer:
        with storage(files.root) as (filesystem, inner):
            name = f"{inner.rstrip('/')}/{files.names[index]}"
            return read_footer(filesystem, name, files.path(index), files.sizes[index])

    with ThreadPoolExecutor(min(FOOTER_THREADS, len(files.names))) as threads:
        footers = list(threads.map(footer, range(len(files.names))))
    leaves = [image_leaf(f.schema, image_column, label_column, files.path(i)) for i, f in enumerate(footers)]
    identity = [[size, f.sha256, f.num_rows, leaf] for size, f, leaf in zip(files.sizes, footers, leaves, strict=True)]
    source = ParquetSource(
        row_groups=layout([f.num_rows for f in footers]),
        fingerprint=sha256_of(["parquet", image_column, label_column, identity]),
        files=files,
        image_leaves=tuple(leaves),
        image_column=image_column,
        label_column=label_column,
    )
    if source.num_rows == 0:
        raise DataError(
            f"{files.path(0)}{f' and {len(files.names) - 1} more' if len(files.names) > 1 else ''}: no rows at all. "
            "Give a path with data."
        )
    return source


def image_leaf(schema: pa.Schema, image_column: str, label_column: str, path: str) -> str:
    """The Parquet column that holds the encoded image. Raises DataError for missing columns and types that do not
    fit."""
    known = ", ".join(f"{field.name} ({_short(field.type)})" for field in schema)
    for name, option in ((image_column, "image_column"), (label_column, "label_column")):
        if name not in schema.names:
            raise DataError(f"{path} has no column {name!r}. It has: {known}. Set data.{option} to one of them.")
    label = schema.field(label_column).type
    if not pa.types.is_integer(label):
        raise DataError(
            f"{path}: label column {label_column!r} is {_short(label)}, not an integer class index. Columns: {known}."
        )
    image = schema.field(image_column).type
    if _is_binary(image):
        return image_column
    if pa.types.is_struct(image) and image.get_field_index("bytes") >= 0 and _is_binary(image.field("bytes").type):
        return f"{image_column}.bytes"
    raise DataError(
        f"{path}: image column {image_column!r} is {_short(image)}, neither binary nor struct<bytes: binary>. "
        f"Columns: {known}."
    )


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _short(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class ParquetGroup:
    """The two columns of one row group."""

    images: pa.ChunkedArray
    labels: pa.ChunkedArray
    path: str
    row_group: int
    first_row: int
    """Of the row group, in the file."""

    def rows(self, start: int, stop: int) -> list[Row]:
        _require_range(start, stop, len(self.labels), self.path, self.row_group)
        images = self.images.slice(start, stop - start).to_pylist()
        labels = self.labels.slice(start, stop - start).to_pylist()
        places = (RowPlace(self.path, self.row_group, self.first_row + i) for i in range(start, stop))
        return [Row(image, label, where) for image, label, where in zip(images, labels, places, strict=True)]


def _require_range(start: int, stop: int, num_rows: int, path: str, row_group: int) -> None:
    if not 0 <= start <= stop <= num_rows:
        raise DataError(
            f"{path}: rows {start}..{stop} asked of row group {row_group}, which has {num_rows}. Was the file "
            "written anew since the run began?"
        )


class OpenFiles:
    """The Parquet files that one process has open, the most recently used ones. A copy sent elsewhere starts empty."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: OrderedDict[int, tuple[threading.Lock, pq.ParquetFile]] = OrderedDict()

    def get(self, files: Files, index: int) -> tuple[threading.Lock, pq.ParquetFile]:
        """A reader and the lock to hold while using it."""
        with self._lock:
            if index not in self._open:
                self._open[index] = (threading.Lock(), self._reader(files, index))
                if len(self._open) > OPEN_FILES:
                    self._open.popitem(last=False)  # closes when its last user lets go
            self._open.move_to_end(index)
            return self._open[index]

    @staticmethod
    def _reader(files: Files, index: int) -> pq.ParquetFile:
        filesystem, inner = file_system(files.root)
        file = filesystem.open_input_file(f"{inner.rstrip('/')}/{files.names[index]}")
        if file.size() != files.sizes[index]:
            raise DataError(
                f"{files.path(index)} has {file.size()} bytes now and had {files.sizes[index]} when the run began. "
                "Put the old file back, or begin a new run directory."
            )
        return pq.ParquetFile(file, pre_buffer=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, ()


@dataclass(eq=False)
class ParquetSource(Source):
    """Rows of Parquet files, one after the other."""

    files: Files = field(repr=False)
    image_leaves: Sequence[str] = field(repr=False)
    """For each file: `image` or `image.bytes`."""
    image_column: str
    label_column: str
    _open: OpenFiles = field(default_factory=OpenFiles, init=False, repr=False)

    def load(self, file: int, row_group: int) -> ParquetGroup:
        path, leaf = self.files.path(file), self.image_leaves[file]
        lock, reader = self._open.get(self.files, file)
        try:
            with lock:
                table = reader.read_row_group(row_group, columns=[leaf, self.label_column], use_threads=False)
                first = sum(reader.metadata.row_group(i).num_rows for i in range(row_group))
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{path}, row group {row_group}: {error}. The file is damaged; copy or write it again."
            ) from error
        except OSError as error:  # a flaky network, or damage: both are tried again elsewhere before a run gives up
            raise OSError(f"{path}, row group {row_group}: {error}") from error
        images = table[self.image_column]
        if leaf != self.image_column:
            images = pc.struct_field(images, "bytes")  # unlike .field(), keeps the nulls of the struct itself
        return ParquetGroup(images, table[self.label_column], path, row_group, first)
