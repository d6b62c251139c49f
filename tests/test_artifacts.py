"""Whole files or none, and a manifest that knows what each stage was made from."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import artifacts
from pipeline.artifacts import Manifest, StaleArtifact, StorageError


def test_a_file_is_replaced_whole(tmp_path: Path):
    path = str(tmp_path / "deep" / "file")
    artifacts.write_bytes(path, b"first")
    artifacts.write_bytes(path, b"second")
    assert artifacts.read_bytes(path) == b"second"
    assert os.listdir(tmp_path / "deep") == ["file"]


def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = str(tmp_path / "file")
    artifacts.write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*file: No space left.*same command again"):
        artifacts.write_bytes(path, b"new")
    assert artifacts.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_parts_that_end_in_an_error_leave_the_old_file_and_no_rest(tmp_path: Path):
    def parts() -> Iterator[bytes]:
        yield b"new"
        raise ValueError("half way")

    path = str(tmp_path / "file")
    artifacts.write_bytes(path, b"old")
    with pytest.raises(ValueError, match="half way"):
        artifacts.write_parts(path, parts())
    assert artifacts.read_bytes(path) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_rename_counts_though_nfs_lost_the_answer_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    really = os.replace

    def twice(source: str, target: str) -> None:
        really(source, target)
        really(source, target)

    monkeypatch.setattr(os, "replace", twice)
    artifacts.write_bytes(str(tmp_path / "file"), b"new")
    assert artifacts.read_bytes(str(tmp_path / "file")) == b"new"

    monkeypatch.setattr(os, "replace", lambda source, target: really(source + "x", target))  # really not there
    with pytest.raises(StorageError, match="cannot write"):
        artifacts.write_bytes(str(tmp_path / "file"), b"newer")
    assert artifacts.read_bytes(str(tmp_path / "file")) == b"new"


def test_a_mount_that_cannot_sync_directories_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    really = os.fsync

    def files_only(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        really(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    artifacts.write_bytes(str(tmp_path / "file"), b"new")
    assert artifacts.read_bytes(str(tmp_path / "file")) == b"new"


@pytest.mark.parametrize(("times", "passes"), [(2, True), (99, False)])
def test_a_file_that_was_replaced_while_nfs_read_it_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int, passes: bool
):
    path = tmp_path / "file"
    path.write_bytes(b"new")
    left = [times]

    def stale(*args: object) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return open(*args)

    monkeypatch.setattr(artifacts, "open", stale, raising=False)
    if passes:
        assert artifacts.read_bytes(str(path)) == b"new"
    else:
        with pytest.raises(StorageError, match="Stale file handle") as caught:
            artifacts.read_bytes(str(path))
        assert caught.value.may_pass


def test_a_name_that_nfs_remembers_as_missing_is_asked_for_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As its client does it: what was missing stays missing until a directory above is opened."""
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "grid.json").touch()
    really_exists, really_open, opened = os.path.exists, os.open, []
    monkeypatch.setattr(os.path, "exists", lambda path: bool(opened) and really_exists(path))
    monkeypatch.setattr(os, "open", lambda path, flags: opened.append(path) or really_open(path, flags))
    assert artifacts.exists(str(tmp_path / "units" / "grid.json"))
    assert opened == [str(tmp_path / "units")]
    assert not artifacts.exists(str(tmp_path / "other" / "deep" / "grid.json"))
    assert opened[-1] == str(tmp_path)


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StorageError, match="writable --run-dir"):
        artifacts.probe_writable(str(tmp_path / "file"))


def test_options_of_a_uri_stay_at_its_end():
    assert artifacts.join("s3://bucket/run/", "a", "b") == "s3://bucket/run/a/b"
    assert artifacts.join("s3://bucket/run?region=eu-west-1", "a") == "s3://bucket/run/a?region=eu-west-1"
    assert artifacts.join("/data/what?", "a") == "/data/what?/a"


def test_a_file_uri_is_a_local_path_and_is_written_as_safely(tmp_path: Path):
    assert artifacts.absolute(f"file://{tmp_path}/run") == f"{tmp_path}/run"


def test_what_is_missing_or_unreachable_is_named(tmp_path: Path):
    with pytest.raises(StorageError, match=r"cannot read .*gone"):
        artifacts.read_bytes(str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"ftp://host/file: .*Check the address"):
        artifacts.read_bytes("ftp://host/file")


def test_broken_json_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StorageError, match=r"a\.json is not valid JSON"):
        artifacts.read_json(str(tmp_path / "a.json"))


def test_unfinished_writes_are_not_listed(tmp_path: Path):
    for name in ("b", "a", ".a.tmp-12345678"):
        (tmp_path / name).touch()
    assert artifacts.list_dir(str(tmp_path)) == ["a", "b"]
    assert artifacts.list_dir(str(tmp_path / "missing")) == []


def test_differences_name_the_leaves_that_changed():
    old, new = {"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 2, "d": 4}, "e": 5}
    assert artifacts.differences(old, new) == ["b.d: 3 -> 4", "e: None -> 5"]


def test_a_stage_is_done_only_when_it_was_finished_and_only_for_its_inputs(tmp_path: Path):
    manifest = Manifest(str(tmp_path))
    assert not manifest.finished("score", {"rows": 1})
    manifest.begin("score", {"rows": 1})
    assert not Manifest(str(tmp_path)).finished("score", {"rows": 1})
    assert not Manifest(str(tmp_path)).finished("score", {"rows": 3})  # nothing is lost by beginning anew
    assert manifest.changes("score", {"rows": 3}) == ["rows: 1 -> 3"]
    manifest.finish("score", "saliency")
    assert Manifest(str(tmp_path)).finished("score", {"rows": 1})
    with pytest.raises(StaleArtifact, match=r"stage 'score' was made from \w+, this run asks for \w+ \(rows: 1 -> 2\)"):
        manifest.finished("score", {"rows": 2})


def test_the_second_driver_of_a_run_directory_is_noticed(tmp_path: Path):
    first = Manifest(str(tmp_path))
    first.begin("score", {})
    second = Manifest(str(tmp_path))
    second.begin("score", {})
    with pytest.raises(StorageError, match="another driver works in this directory"):
        first.finish("score", "saliency")
    second.finish("score", "saliency")


def test_a_stage_that_goes_on_counts_its_attempts_and_times_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [1000.0]
    monkeypatch.setattr("pipeline.artifacts.time.time", lambda: now[0])
    Manifest(str(tmp_path)).begin("score", {})
    now[0] = 90_000.0  # the next day
    manifest = Manifest(str(tmp_path))
    manifest.begin("score", {})
    now[0] = 90_060.0
    manifest.finish("score", "saliency")
    record = Manifest(str(tmp_path)).stages["score"]
    assert (record.attempts, record.seconds) == (2, 60.0)
