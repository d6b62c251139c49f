"""Opening a data set by its path: Parquet (file, directory, glob, s3://, gs://), an image folder, or hf:."""

from __future__ import annotations

from pipeline.artifacts import absolute
from pipeline.data import hub, places
from pipeline.data.folder import IMAGE_SUFFIXES, open_folder
from pipeline.data.parquet import open_parquet
from pipeline.data.source import DataError, Group, Row, RowGroups, RowPlace, Source

__all__ = ["DataError", "Group", "Row", "RowGroups", "RowPlace", "Source", "open_source"]

PARQUET_SUFFIXES = (".parquet", ".pq")


def open_source(
    path: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    cache_dir: str | None = None,
    split: str | None = None,
) -> Source:
    """Rows behind `path`, in a fixed order. Reads footers or names, no images.

    Args:
        path: Parquet file; directory with Parquet files, at any depth, sorted by name; glob (`data/*/train-*.parquet`);
            URI of a file, directory or glob (`s3://bucket/dir`); directory with one subdirectory of images for each
            class, whose sorted names are the labels; or `hf:OWNER/NAME[:SPLIT]`, `hf:OWNER/NAME:CONFIG:SPLIT`.
        image_column: encoded images, binary or Hugging Face's struct<bytes, path>. Not used for image folders.
        label_column: integer class indices.
        cache_dir: where rows from the Hub are kept as Parquet; on a cluster, a directory that all nodes share.
        split: of a Hub data set; what follows its name in `path` is then the config.

    Raises:
        DataError: nothing is there, a file is no Parquet file, a column is missing or has another type, there are no
        rows.
    """
    if path.startswith("hf:"):
        path = hub.fetch(path, split, image_column, label_column, cache_dir)
    elif not path:
        raise DataError(
            "the path of the data is empty. Set data.train and data.val to Parquet files, an image folder or "
            "hf:OWNER/NAME."
        )
    files = places.find(path)
    parquet = files.select(PARQUET_SUFFIXES)
    images = files.select(IMAGE_SUFFIXES)
    if parquet.names:
        return open_parquet(parquet, image_column, label_column)
    if images.names:
        return open_folder(images)
    if (
        len(files.names) == 1 and files.path(0) == absolute(path).partition("?")[0]
    ):  # its first bytes say what it is, not its name
        return open_parquet(files, image_column, label_column)
    there = f"it has {len(files.names)} files, the first: {files.names[0]}" if files.names else "it has no files"
    raise DataError(
        f"{path}: no Parquet file ({', '.join(PARQUET_SUFFIXES)}) and no image ({', '.join(IMAGE_SUFFIXES[:4])}, "
        f"...) in it; {there}. "
        "Give a directory with Parquet files, or one with a subdirectory of images for each class."
    )
