"""Rows from the Hugging Face Hub: converted once to local Parquet, read from there ever after, without network."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.artifacts import exists, is_uri, join, sha256_of, write_json
from pipeline.data.parquet import image_leaf
from pipeline.data.source import DataError

DEFAULT_CACHE = "~/.cache/gradient-pruning-pipeline"
DONE = "_SUCCESS.json"
ROWS_PER_GROUP = 256
ROWS_PER_FILE = 16_384


@dataclass(frozen=True)
class HubName:
    """What `hf:...` names."""

    name: str
    config: str | None
    split: str


def parse(path: str, split: str | None = None) -> HubName:
    """`hf:OWNER/NAME[:SPLIT]` or `hf:OWNER/NAME:CONFIG:SPLIT`; with `split` given apart, `hf:OWNER/NAME[:CONFIG]`.
    Default: train."""
    parts = re.split(r":(?![^\[]*\])", path.removeprefix("hf:"))  # a colon inside train[:10%] separates nothing
    name, rest = parts[0], parts[1:]
    if not name or not all(rest) or len(rest) > (2 if split is None else 1):
        raise DataError(f"{path!r} is none of hf:OWNER/NAME, hf:OWNER/NAME:SPLIT and hf:OWNER/NAME:CONFIG:SPLIT.")
    if split is not None:
        return HubName(name, rest[0] if rest else None, split)
    return HubName(name, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "train")


def fetch(path: str, split: str | None, image_column: str, label_column: str, cache_dir: str | None) -> str:
    """The local directory with the Parquet files of a Hub data set; made on the first call, whole or not at all."""
    wanted = parse(path, split)
    cache = os.path.abspath(os.path.expanduser(cache_dir or DEFAULT_CACHE))
    if is_uri(cache_dir or ""):
        raise DataError(
            f"cache_dir is {cache_dir}: rows from the Hub are kept on a file system that is mounted. Give a local "
            "or shared directory."
        )
    key = sha256_of([wanted.name, wanted.config, wanted.split, image_column, label_column])[:8]
    words = [wanted.name.replace("/", "--"), wanted.config or "default", wanted.split, key]
    directory = join(cache, "hf", re.sub(r"[^\w.-]+", "_", "-".join(words)))
    if exists(join(directory, DONE)):
        return directory
    dataset = _load(path, wanted)
    unfinished = f"{directory}.tmp-{uuid.uuid4().hex[:8]}"
    os.makedirs(unfinished)
    try:
        num_rows = _write(dataset, path, image_column, label_column, unfinished)
        write_json(
            join(unfinished, DONE),
            {"name": wanted.name, "config": wanted.config, "split": wanted.split, "rows": num_rows},
        )
        if os.path.isdir(directory) and not exists(join(directory, DONE)):
            shutil.rmtree(directory)
        try:
            os.rename(unfinished, directory)
        except OSError:
            if not exists(join(directory, DONE)):  # otherwise another process was faster, with the same rows
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def _load(path: str, wanted: HubName) -> Any:
    import datasets

    try:
        return datasets.load_dataset(wanted.name, wanted.config, split=wanted.split)
    except Exception as error:  # the library raises dozens of kinds, its own, the network's and the file system's
        raise DataError(
            f"{path}: cannot load {wanted.name} (config {wanted.config or 'default'}, split {wanted.split}) from "
            "the Hub: "
            f"{type(error).__name__}: {error}. Check name and network, log in for gated sets (`hf auth login`), or "
            "download the set "
            "and give the path of its Parquet files."
        ) from error


def _write(dataset: Any, path: str, image_column: str, label_column: str, directory: str) -> int:
    schema = dataset.features.arrow_schema.remove_metadata()
    image_leaf(schema, image_column, label_column, path)
    dataset = dataset.select_columns([image_column, label_column]).with_format("arrow")
    tables = _embedded(dataset, path, image_column)
    num_rows = 0
    for index, first in enumerate(range(0, len(dataset), ROWS_PER_FILE)):
        writer = None
        for _ in range(first, min(first + ROWS_PER_FILE, len(dataset)), ROWS_PER_GROUP):
            table = next(tables)
            if writer is None:
                writer = pq.ParquetWriter(
                    join(directory, f"part-{index:05d}.parquet"), table.schema, compression="none"
                )
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            num_rows += len(table)
        assert writer is not None
        writer.close()
    if num_rows == 0:
        raise DataError(f"{path}: the split has no rows. Choose another split.")
    return num_rows


def _embedded(dataset: Any, path: str, image_column: str) -> Iterator[pa.Table]:
    """Tables of one row group each; images that are stored as a path into the download are read into the table."""
    for table in dataset.iter(batch_size=ROWS_PER_GROUP):
        table = table.replace_schema_metadata(None)
        column = table[image_column]
        if pa.types.is_struct(column.type) and pc.struct_field(column, "bytes").null_count:
            values = [_with_bytes(value, path) for value in column.to_pylist()]
            index = table.schema.get_field_index(image_column)
            table = table.set_column(index, image_column, pa.array(values, type=column.type))
        yield table


def _with_bytes(value: dict[str, Any] | None, path: str) -> dict[str, Any] | None:
    if value is None or value["bytes"] is not None or not value.get("path"):
        return value
    try:
        return {**value, "bytes": Path(value["path"]).read_bytes(), "path": os.path.basename(value["path"])}
    except OSError as error:
        raise DataError(
            f"{path}: the image {value['path']} is not where the data set says ({error}). Remove its cached "
            "download and try again."
        ) from error
