"""Opening and reading sources: what is there, what is refused and with which words."""

from __future__ import annotations

import pickle
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.folder import require_same_classes
from pipeline.data.rows import DataError, RowPlace, open_source
from tests.data.making import image, write_parquet, write_rows


def labels_of(source, file, row_group, start, stop):
    return [row.label for row in source.read(file, row_group, start, stop)]


def test_row_groups_and_rows_of_a_file(tmp_path):
    source = open_source(str(write_rows(tmp_path / "a.parquet", 10)))
    assert source.num_rows == 10
    assert source.row_groups.num_rows.tolist() == [4, 4, 2]
    assert source.row_groups.group.tolist() == [0, 1, 2]
    assert source.row_groups.file.tolist() == [0, 0, 0]
    (row,) = source.read(0, 1, 2, 3)
    assert row.where == RowPlace(str(tmp_path / "a.parquet"), 1, 6)
    assert (row.image, row.label) == (image(6), 6)
    assert str(row.where).endswith("a.parquet, row 6 (row group 1)")


def test_plain_binary_column_and_other_names(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [b"x", b"y"], [1, 0], plain=True, names=("img", "cls"))
    source = open_source(str(path), image_column="img", label_column="cls")
    assert [(row.image, row.label) for row in source.read(0, 0, 0, 2)] == [(b"x", 1), (b"y", 0)]


def test_nulls_come_as_none(tmp_path):
    source = open_source(str(write_parquet(tmp_path / "a.parquet", [None, b"x"], [3, None])))
    assert [(row.image, row.label) for row in source.read(0, 0, 0, 2)] == [(None, 3), (b"x", None)]


def test_a_directory_is_read_in_the_order_of_its_names_at_any_depth(tmp_path):
    write_rows(tmp_path / "b" / "0.parquet", 2, first=4)
    write_rows(tmp_path / "a" / "deep" / "1.parquet", 2, first=2)
    write_rows(tmp_path / "a" / "0.parquet", 2)
    (tmp_path / "README.md").write_text("about")
    write_rows(tmp_path / "_temporary" / "0.parquet", 2, first=8)
    source = open_source(str(tmp_path))
    assert source.row_groups.file.tolist() == [0, 1, 2]
    assert [labels_of(source, file, 0, 0, 2) for file in range(3)] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("pattern", "rows"),
    [
        ("train-*.parquet", 3),
        ("**/train-*.parquet", 6),
        ("train-0000[12].parquet", 2),
        ("train-0000?.parquet", 3),
        ("*/*.parquet", 4),
    ],
)
def test_globs(tmp_path, pattern, rows):
    for name in (
        "train-00000",
        "train-00001",
        "train-00002",
        "sub/train-00000",
        "sub/train-00001",
        "sub/train-00002",
        "sub/val-0",
    ):
        write_rows(tmp_path / f"{name}.parquet", 1)
    assert open_source(str(tmp_path / pattern)).num_rows == rows


def test_a_directory_with_brackets_in_its_name_is_no_glob(tmp_path):
    write_rows(tmp_path / "photos[1]" / "a.parquet", 3)
    assert open_source(str(tmp_path / "photos[1]")).num_rows == 3


def test_a_uri_reads_what_the_path_reads(tmp_path):
    write_rows(tmp_path / "d" / "a.parquet", 6)
    for uri in (f"file://{tmp_path}/d", f"file://{tmp_path}/d/a.parquet", f"file://{tmp_path}/*/a.parquet"):
        source = pickle.loads(pickle.dumps(open_source(uri)))
        assert labels_of(source, 0, 1, 0, 2) == [4, 5]
        assert source.fingerprint == open_source(str(tmp_path / "d")).fingerprint


def test_a_relative_path_holds_in_another_working_directory(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.parquet", 2)
    monkeypatch.chdir(tmp_path)
    source = open_source("a.parquet")
    monkeypatch.chdir("/")
    assert labels_of(source, 0, 0, 0, 2) == [0, 1]


def test_fingerprint_follows_the_data_and_not_the_place(tmp_path):
    write_rows(tmp_path / "x" / "a.parquet", 8)
    shutil.copytree(tmp_path / "x", tmp_path / "elsewhere" / "y")
    write_rows(tmp_path / "z" / "a.parquet", 8, rows_per_group=2)
    first = open_source(str(tmp_path / "x")).fingerprint
    assert open_source(str(tmp_path / "elsewhere" / "y")).fingerprint == first
    assert open_source(str(tmp_path / "x" / "a.parquet")).fingerprint == first
    assert open_source(str(tmp_path / "z")).fingerprint != first
    write_rows(tmp_path / "x" / "b.parquet", 8)
    assert open_source(str(tmp_path / "x")).fingerprint != first


def test_columns_are_part_of_the_fingerprint(tmp_path):
    labels = pa.array([0, 1])
    path = tmp_path / "a.parquet"
    table = pa.table({"image": pa.array([b"x", b"y"]), "label": labels, "coarse": labels})
    pq.write_table(table, path)
    assert open_source(str(path)).fingerprint != open_source(str(path), label_column="coarse").fingerprint


def test_parts_of_one_row_group_read_it_once(tmp_path, monkeypatch):
    source = open_source(str(write_rows(tmp_path / "a.parquet", 8)))
    loads = []
    load = type(source).load
    monkeypatch.setattr(type(source), "load", lambda self, file, group: loads.append(group) or load(self, file, group))
    threads = [threading.Thread(target=source.read, args=(0, 1, i, i + 1)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.read(0, 0, 0, 4)
    assert loads == [1, 0]


def test_a_pickled_source_is_small_and_carries_no_open_file(tmp_path):
    source = open_source(str(write_rows(tmp_path / "a.parquet", 8)))
    before = len(pickle.dumps(source))
    source.read(0, 0, 0, 4)
    assert len(pickle.dumps(source)) == before < 2000


def test_more_files_than_a_process_keeps_open(tmp_path):
    for i in range(12):
        write_rows(tmp_path / f"{i:02d}.parquet", 1, first=i)
    source = open_source(str(tmp_path))
    assert [labels_of(source, i, 0, 0, 1)[0] for i in [*range(12), 0]] == [*range(10), 0, 1, 0]


def test_image_folder_labels_are_the_sorted_class_names(tmp_path):
    for name, value in (("dog/1.png", 1), ("ant/x.png", 2), ("dog/sub/2.png", 3), ("cat/3.png", 4)):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).write_bytes(image(value))
    source = pickle.loads(pickle.dumps(open_source(str(tmp_path / "d"))))
    rows = source.read(0, 0, 0, 4)
    found = {Path(row.where.file).relative_to(tmp_path / "d").as_posix(): (row.label, row.image) for row in rows}
    assert found == {
        "dog/1.png": (2, image(1)),
        "ant/x.png": (0, image(2)),
        "dog/sub/2.png": (2, image(3)),
        "cat/3.png": (1, image(4)),
    }
    shutil.copytree(tmp_path / "d", tmp_path / "e")
    assert open_source(str(tmp_path / "e")).fingerprint == source.fingerprint
    (tmp_path / "e" / "cat" / "3.png").write_bytes(image(4) + b"!")
    assert open_source(str(tmp_path / "e")).fingerprint != source.fingerprint


def test_folders_with_other_classes_are_refused_since_a_label_would_mean_two_things(tmp_path):
    for split, classes in (("train", "abc"), ("val", "ac"), ("same", "abc")):
        for name in classes:
            path = tmp_path / split / name / "0.png"
            path.parent.mkdir(parents=True)
            path.write_bytes(image(0))
    train, val, same = (open_source(str(tmp_path / split)) for split in ("train", "val", "same"))
    with pytest.raises(DataError, match="only one of the two has b"):
        require_same_classes(train, val)
    require_same_classes(train, same)


def test_image_folder_mixes_its_classes_and_has_virtual_row_groups(tmp_path):
    for label in "ab":
        (tmp_path / label).mkdir()
        for i in range(200):
            (tmp_path / label / f"{i}.png").write_bytes(b"x")
    source = open_source(str(tmp_path))
    assert source.row_groups.num_rows.tolist() == [256, 144]
    assert 30 < sum(labels_of(source, 0, 0, 0, 100)) < 70
    assert source.read(0, 1, 143, 144)[0].where.row == 399


# --- what is refused -------------------------------------------------------------------------------------------------


def refused(path, *words, **options):
    with pytest.raises(DataError) as caught:
        open_source(str(path), **options)
    for word in words:
        assert word in str(caught.value)


def test_a_missing_path(tmp_path):
    refused(tmp_path / "none", str(tmp_path / "none"), "no such file or directory")
    refused("", "data.train")
    refused(tmp_path / "*.parquet", "no file matches")


def test_a_directory_without_rows(tmp_path):
    refused(tmp_path, str(tmp_path), "no files")
    (tmp_path / "notes.txt").write_text("hello")
    refused(tmp_path, "notes.txt", "no Parquet file")


def test_a_text_file(tmp_path):
    for name in ("a.txt", "a.parquet"):
        (tmp_path / name).write_text("image,label\n1,2\n")
        refused(tmp_path / name, name, "not a Parquet file", "image,label")


def test_an_empty_file(tmp_path):
    (tmp_path / "a.parquet").touch()
    refused(tmp_path / "a.parquet", "a.parquet", "empty (0 bytes)")


def test_a_file_that_was_cut_off(tmp_path):
    path = write_rows(tmp_path / "a.parquet", 8)
    path.write_bytes(path.read_bytes()[:-20])
    refused(tmp_path, "a.parquet", "cut off")


def test_a_footer_that_is_garbage(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\xff" * 40 + (40).to_bytes(4, "little") + b"PAR1")
    refused(tmp_path, "a.parquet", "footer cannot be read")


def test_no_rows_at_all(tmp_path):
    refused(write_parquet(tmp_path / "a.parquet", [], []), "a.parquet", "no rows")


def test_a_missing_column_lists_those_that_are_there(tmp_path):
    path = write_rows(tmp_path / "a.parquet", 2)
    refused(path, "'img'", "image (struct<", "label (int64)", "data.image_column", image_column="img")
    refused(path, "'fine'", "data.label_column", label_column="fine")


def test_columns_of_the_wrong_type(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [b"x"], pa.array(["cat"]))
    refused(path, "label column 'label' is string", "not an integer")
    pq.write_table(pa.table({"image": ["x.png"], "label": [1]}), path)
    refused(path, "image column 'image' is string", "struct<bytes: binary>")


def test_images_outside_class_directories(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"x")
    (tmp_path / "loose.png").write_bytes(b"x")
    refused(tmp_path, "loose.png", "ROOT/CLASS/IMAGE")


def test_an_unknown_scheme():
    refused("ftp://host/a.parquet", "s3://", "ftp://host")


def test_a_file_that_changed_since_it_was_opened(tmp_path):
    path = write_rows(tmp_path / "a.parquet", 8)
    source = pickle.loads(pickle.dumps(open_source(str(path))))
    write_rows(path, 4)
    with pytest.raises(DataError, match="when the run began"):
        source.read(0, 0, 0, 1)


def test_a_damaged_row_group_is_named(tmp_path):
    path = write_rows(tmp_path / "a.parquet", 8)
    source = open_source(str(path))
    data = bytearray(path.read_bytes())
    data[4:200] = b"\xff" * 196
    path.write_bytes(data)
    with pytest.raises((DataError, OSError), match=r"a\.parquet, row group 0"):
        source.read(0, 0, 0, 4)
