"""Sets from the Hub, through a fake loader: converted once, whole or not at all."""

from __future__ import annotations

import os

import datasets
import pytest

from pipeline.data import hub
from pipeline.data.hub import HubName, parse
from pipeline.data.rows import DataError, open_source
from tests.data.making import image


@pytest.fixture
def fake_hub(monkeypatch):
    """Answers load_dataset with five rows; notes the calls; can be told to fail."""
    calls: list[tuple] = []

    def load_dataset(name, config=None, *, split):
        calls.append((name, config, split))
        if name == "nobody/nothing":
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub.")
        features = datasets.Features(
            {"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"]), "x": datasets.Value("string")}
        )
        rows = {
            "img": [{"bytes": image(i), "path": None} for i in range(5)],
            "label": [0, 1, 0, 1, 1],
            "x": list("vwxyz"),
        }
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


@pytest.mark.parametrize(
    ("path", "split", "wanted"),
    [
        ("hf:o/n", None, HubName("o/n", None, "train")),
        ("hf:o/n:test", None, HubName("o/n", None, "test")),
        ("hf:o/n:train[:10%]", None, HubName("o/n", None, "train[:10%]")),
        ("hf:o/n:small:test", None, HubName("o/n", "small", "test")),
        ("hf:o/n:small", "validation", HubName("o/n", "small", "validation")),
        ("hf:mnist", None, HubName("mnist", None, "train")),
    ],
)
def test_names(path, split, wanted):
    assert parse(path, split) == wanted


@pytest.mark.parametrize("path", ["hf:", "hf:o/n:", "hf:o/n:a:b:c"])
def test_names_that_are_none(path):
    with pytest.raises(DataError, match="hf:OWNER/NAME:SPLIT"):
        parse(path)


def test_a_set_is_converted_once_and_read_without_the_hub(tmp_path, fake_hub, monkeypatch):
    options = {"image_column": "img", "cache_dir": str(tmp_path)}
    first = open_source("hf:o/n:test", **options)
    assert fake_hub == [("o/n", None, "test")]
    assert [row.label for row in first.read(0, 0, 0, 5)] == [0, 1, 0, 1, 1]
    assert [row.image for row in first.read(0, 0, 0, 5)] == [image(i) for i in range(5)]

    monkeypatch.setattr(datasets, "load_dataset", None)
    again = open_source("hf:o/n:test", **options)
    assert again.fingerprint == first.fingerprint


def test_images_that_lie_beside_the_table_are_read_into_it(tmp_path, monkeypatch):
    (tmp_path / "7.png").write_bytes(image(7))
    rows = {"image": [str(tmp_path / "7.png")], "label": [0]}
    dataset = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: dataset)
    source = open_source("hf:o/n", cache_dir=str(tmp_path / "cache"))
    (tmp_path / "7.png").unlink()
    assert source.read(0, 0, 0, 1)[0].image == image(7)


def test_several_files_and_row_groups(tmp_path, fake_hub, monkeypatch):
    monkeypatch.setattr(hub, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(hub, "ROWS_PER_FILE", 4)
    source = open_source("hf:o/n", image_column="img", cache_dir=str(tmp_path))
    assert source.row_groups.file.tolist() == [0, 0, 1]
    assert source.row_groups.num_rows.tolist() == [2, 2, 1]


def test_a_conversion_that_broke_off_is_not_taken_for_a_whole_one(tmp_path, fake_hub, monkeypatch):
    monkeypatch.setattr(hub, "ROWS_PER_GROUP", 2)
    monkeypatch.setattr(hub, "ROWS_PER_FILE", 2)
    original = hub.pq.ParquetWriter.write_table
    writes = []

    def full_disk(self, *args, **kwargs):
        writes.append(1)
        if len(writes) == 2:
            raise OSError(28, "No space left on device")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(hub.pq.ParquetWriter, "write_table", full_disk)
    with pytest.raises(OSError, match="No space left"):
        open_source("hf:o/n", image_column="img", cache_dir=str(tmp_path))
    assert os.listdir(tmp_path / "hf") == []
    assert open_source("hf:o/n", image_column="img", cache_dir=str(tmp_path)).num_rows == 5


def test_what_the_hub_refuses_is_explained(tmp_path, fake_hub):
    with pytest.raises(DataError, match=r"hf:nobody/nothing.*doesn't exist.*hf auth login"):
        open_source("hf:nobody/nothing", cache_dir=str(tmp_path))


def test_a_missing_column_is_named_before_anything_is_written(tmp_path, fake_hub):
    with pytest.raises(DataError, match=r"no column 'image'. It has: img .*label"):
        open_source("hf:o/n", cache_dir=str(tmp_path))
    assert os.listdir(tmp_path / "hf") == []


def test_the_cache_must_be_a_directory(fake_hub):
    with pytest.raises(DataError, match="s3://bucket"):
        open_source("hf:o/n", cache_dir="s3://bucket/cache")
