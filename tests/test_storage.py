"""Local paths, S3 and GCS through one layer: the same is true of each, and of the last two on a real server."""

from __future__ import annotations

import errno
import gc
import importlib.util
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pipeline import artifacts, stages
from pipeline.artifacts import BadAddress, Manifest, RemoteError, StaleArtifact, StorageError
from pipeline.data.rows import open_source
from pipeline.data.source import DataError, Source
from pipeline.execution.ledger import Commit, Ledger
from pipeline.run import Run
from pipeline.saliency.exact import Grid
from pipeline.training import checkpoint
from tests import test_run as small
from tests.data.making import image, write_rows
from tests.object_store import ObjectStore

MB = 1 << 20
GRID = Grid({"a": [0]}, 40)


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with ObjectStore("s3") as store:
        yield store


@pytest.fixture(scope="module")
def gs() -> Iterator[ObjectStore]:
    if importlib.util.find_spec("gcp_storage_emulator") is None:
        pytest.skip("needs gcp-storage-emulator")
    with ObjectStore("gs") as store:
        yield store


@pytest.fixture(params=["local", "s3", "gs"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory of which nothing is known yet."""
    if request.param == "local":
        return str(tmp_path / "run")
    store: ObjectStore = request.getfixturevalue(request.param)
    return store.uri(f"bucket/{tmp_path.name}/run")


@pytest.fixture
def s3_root(s3: ObjectStore, tmp_path: Path) -> str:
    return s3.uri(f"bucket/{tmp_path.name}/run")


def upload(files: Path, root: str) -> None:
    for path in files.rglob("*"):
        if path.is_file():
            artifacts.copy(str(path), artifacts.join(root, *path.relative_to(files).parts))


def pixels(source: Source) -> list[tuple[bytes | None, int | None]]:
    groups = source.row_groups
    return [
        (row.image, row.label)
        for file, group, rows in zip(groups.file.tolist(), groups.group.tolist(), groups.num_rows.tolist(), strict=True)
        for row in source.read(file, group, 0, rows)
    ]


# --- whole files -------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_listed_copied_and_removed(root: str):
    path, other = artifacts.join(root, "deep", "a.json"), artifacts.join(root, "b")
    artifacts.write_json(path, {"a": 1})
    artifacts.copy(path, other)
    assert artifacts.read_json(other) == artifacts.read_json(path) == {"a": 1}
    size = len(artifacts.read_bytes(path))
    assert artifacts.list_sizes(root)["b"] == size
    assert artifacts.list_dir(root) == ["b", "deep"]
    artifacts.remove(other)
    artifacts.remove(other)  # as good as removed
    assert artifacts.list_dir(root) == ["deep"]
    assert (artifacts.exists(path), artifacts.exists(other)) == (True, False)
    artifacts.probe_writable(root)
    assert artifacts.list_dir(root) == ["deep"]


def test_a_file_in_parts_and_its_parts_are_read(root: str):
    path = artifacts.join(root, "parts")
    artifacts.write_parts(path, (bytes([i]) * (6 * MB) for i in range(4)))
    with artifacts.open_file(path) as file:
        file.seek(12 * MB - 2)
        assert file.read(4) == b"\1\1\2\2"
    artifacts.copy(path, artifacts.join(root, "copy"))
    assert artifacts.list_sizes(root) == {"copy": 24 * MB, "parts": 24 * MB}


def test_tensors_come_back(root: str):
    tensors = {"b": torch.arange(6).reshape(2, 3), "a": torch.tensor([0.5]), "none": torch.zeros(0)}
    artifacts.write_tensors(artifacts.join(root, "t.safetensors"), tensors)
    found = artifacts.read_tensors(artifacts.join(root, "t.safetensors"))
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_what_is_missing_is_empty_or_named(root: str):
    artifacts.write_bytes(artifacts.join(root, "a", "b"), b"x")
    assert artifacts.list_dir(artifacts.join(root, "missing")) == []
    assert artifacts.list_dir(artifacts.join(root, "a", "b")) == []
    assert artifacts.exists(artifacts.join(root, "a"))  # a prefix is a directory
    assert artifacts.read_if_there(artifacts.join(root, "missing")) is None
    with pytest.raises(StorageError, match="run/missing") as caught:
        artifacts.read_bytes(artifacts.join(root, "missing"))
    assert (caught.value.errno, caught.value.may_pass) == (errno.ENOENT, False)
    with pytest.raises(StorageError, match="run/a"):
        artifacts.read_bytes(artifacts.join(root, "a"))


@pytest.mark.parametrize("name", ["a b", "50%", "ü+=&@~'()", "a:b", "a#1", "%2541"])
def test_names_may_have_any_characters(root: str, name: str):
    path = artifacts.join(root, name, name)
    artifacts.write_bytes(path, name.encode())
    assert artifacts.read_bytes(path) == name.encode()
    written = "%41" if name == "%2541" and artifacts.is_uri(root) else name  # a URI may escape what it likes
    assert artifacts.list_dir(root) == [written]
    assert artifacts.list_dir(artifacts.join(root, name)) == [written]


@pytest.mark.parametrize("size", [1000, 8 * MB])
def test_a_write_that_dies_half_way_leaves_what_was_there(root: str, size: int):
    """With 8 MB a multipart upload has begun by then."""

    def parts() -> Iterator[bytes]:
        for _ in range(3):
            yield b"x" * size
        raise KeyboardInterrupt

    new, old = artifacts.join(root, "new"), artifacts.join(root, "old")
    artifacts.write_bytes(old, b"old")
    for path in (new, old):
        with pytest.raises(KeyboardInterrupt):
            artifacts.write_parts(path, parts())
    gc.collect()
    assert artifacts.read_if_there(new) is None
    assert artifacts.read_bytes(old) == b"old"
    assert artifacts.list_dir(root) == ["old"]


@pytest.mark.parametrize("size", [1000, 8 * MB])
def test_a_process_that_ends_half_way_leaves_nothing(root: str, size: int):
    if root.startswith("gs"):
        pytest.skip("the same code as S3")
    script = f"""
from pipeline import artifacts
def parts():
    for _ in range(3):
        yield b"x" * {size}
    raise RuntimeError("half way")
artifacts.write_parts({artifacts.join(root, "file")!r}, parts())
"""
    ended = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, timeout=120)
    assert ended.returncode == 1
    assert ended.stderr.decode().strip().endswith("RuntimeError: half way")
    assert artifacts.list_dir(root) == []


def test_the_copy_of_what_cannot_be_read_names_it_and_leaves_nothing(root: str):
    with pytest.raises(StorageError, match=r"cannot read .*run/gone"):
        artifacts.copy(artifacts.join(root, "gone"), artifacts.join(root, "copy"))
    assert artifacts.list_dir(root) == []


def test_a_reader_sees_one_file_or_the_other_whole(root: str):
    """Of two sizes: pyarrow asks for the size first, and reads that much."""
    path = artifacts.join(root, "file")
    versions = [bytes([i]) * (2000 + 1000 * i) for i in range(4)]
    artifacts.write_bytes(path, versions[0])
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for version in versions:
                artifacts.write_bytes(path, version)
                time.sleep(0.02)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen: list[bytes] = []
        while len(seen) < 50 or len({*seen}) < 2:
            with suppress(RemoteError):  # replaced each time that it was read: no file, but no part of one either
                seen.append(artifacts.read_bytes(path))
    finally:
        stop.set()
        writer.join()
    assert {*seen} <= {*versions}


# --- what is made of files ---------------------------------------------------------------------------------------------


def test_a_manifest_remembers_stages_and_notices_another_driver(root: str):
    first = Manifest(root)
    first.begin("score", {"rows": 1})
    assert not Manifest(root).finished("score", {"rows": 1})
    first.finish("score", "saliency")
    assert Manifest(root).finished("score", {"rows": 1})
    with pytest.raises(StaleArtifact, match="rows: 1 -> 2"):
        Manifest(root).finished("score", {"rows": 2})
    Manifest(root).begin("plan", {})
    with pytest.raises(StorageError, match="another driver works in this directory"):
        first.begin("plan", {})


def commit(*units: int) -> Commit:
    """Unit u adds 10^u."""
    return Commit(units, rows=len(units), totals={"a": torch.tensor([sum(10**u for u in units)])})


def test_each_unit_counts_once_whatever_the_ledger_holds(root: str):
    ledger = Ledger(root, 6, "f")
    assert ledger.grid() is None
    assert ledger.coverage().missing == [0, 1, 2, 3, 4, 5]
    ledger.fix_grid(GRID, "cpu")
    ledger.require_same_place("cpu")
    assert ledger.grid() == GRID
    ledger.write(commit(0, 1))
    ledger.write(commit(1, 2))  # of a worker that was believed dead
    ledger.write(commit(3))
    torn = artifacts.join(root, ledger.write(commit(4)))
    artifacts.write_bytes(torn, artifacts.read_bytes(torn)[:-9])
    damaged = artifacts.join(root, ledger.write(commit(5)))
    artifacts.write_bytes(damaged, artifacts.read_bytes(damaged)[:-1] + b"x")
    reading = ledger.coverage()
    assert (reading.missing, len(reading.rejected)) == ([2, 4], 2)
    for unit in (2, 4):
        ledger.write(commit(unit))
    artifacts.remove(damaged)
    ledger.write(commit(5))
    reading = ledger.coverage()
    (sums,) = ledger.pieces(reading, GRID)
    assert (int(sums.totals["a"]), reading.rows, reading.missing) == (111111, 6, [])
    with pytest.raises(StaleArtifact, match="belongs to f"):
        Ledger(root, 6, "g").coverage()


def test_the_newest_undamaged_checkpoint_is_found_and_older_ones_go(root: str):
    identity = {"fingerprint": "f"}
    assert checkpoint.newest(root, identity) is None
    for step in (1, 2, 3):
        checkpoint.save(root, {"step": step, "identity": identity, "weight": torch.full((3,), float(step))})
    assert artifacts.list_dir(root) == ["step-00000002.pt", "step-00000003.pt"]
    path, state = checkpoint.newest(root, identity)
    assert (path, state["weight"].tolist()) == (checkpoint.path_of(root, 3), [3.0, 3.0, 3.0])
    artifacts.write_bytes(path, artifacts.read_bytes(path)[:-20])
    assert checkpoint.newest(root, identity)[1]["step"] == 2
    with pytest.raises(StaleArtifact, match="was trained from f, this run asks for g"):
        checkpoint.newest(root, {"fingerprint": "g"})


# --- rows --------------------------------------------------------------------------------------------------------------


def test_parquet_rows_are_those_of_the_local_files(root: str, tmp_path: Path):
    files = tmp_path / "files"
    write_rows(files / "a" / "one 1.parquet", 6)
    write_rows(files / "a" / "two.parquet", 5, first=6)
    write_rows(files / "b.parquet", 3)
    upload(files, root)
    for pattern in ("a", "a/*.parquet", "a/one 1.parquet", "a/one*", "**/*.parquet"):
        found = open_source(artifacts.join(root, *pattern.split("/")))
        wanted = open_source(str(files / pattern))
        assert found.fingerprint == wanted.fingerprint
        assert pixels(found) == pixels(wanted)


def test_images_in_folders_are_those_of_the_local_files(root: str, tmp_path: Path):
    files = tmp_path / "files"
    for i, name in enumerate(("cats/1.png", "cats/2 a.png", "dogs/1.png")):
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(image(i))
    upload(files, root)
    assert pixels(open_source(root)) == pixels(open_source(str(files)))


def test_rows_that_are_not_there_are_named(root: str):
    artifacts.write_bytes(artifacts.join(root, "a.parquet"), b"none")
    for path in ("missing", "*.nothing"):
        with pytest.raises(DataError, match=rf"run/{path.replace('*', '.')}.*no"):
            open_source(artifacts.join(root, path))
    with pytest.raises(DataError, match=r"a\.parquet \(4 bytes\) is not a Parquet file"):
        open_source(artifacts.join(root, "a.parquet"))


# --- servers that refuse -----------------------------------------------------------------------------------------------


def test_a_missing_bucket_is_named(s3: ObjectStore):
    with pytest.raises(RemoteError, match=r"s3://nobucket/run.*NO_SUCH_BUCKET.*Create the bucket"):
        artifacts.probe_writable(s3.uri("nobucket/run"))
    with pytest.raises(DataError, match=r"s3://nobucket/a\.parquet.*no such file"):
        open_source(s3.uri("nobucket/a.parquet"))


def test_wrong_credentials_are_named_and_not_shown(s3: ObjectStore, s3_root: str):
    artifacts.write_bytes(s3_root, b"x")
    s3.ask("/moto-api/reset-auth", "POST", b"0")  # from here on keys are checked, and nobody has one
    try:
        for work in (artifacts.read_bytes, artifacts.list_dir, artifacts.probe_writable, open_source):
            with pytest.raises(RemoteError, match=r"s3://bucket/.*Check the credentials.*every node") as caught:
                work(s3_root)
            assert "secret" not in str(caught.value)
    finally:
        s3.ask("/moto-api/reset-auth", "POST", b"inf")


@pytest.mark.parametrize(("scheme", "options"), [("s3", {"max_attempts": 2}), ("gs", {"retry_limit_seconds": 2})])
def test_a_server_that_is_not_there_is_named_within_seconds(scheme: str, options: dict[str, int]):
    store = ObjectStore.__new__(ObjectStore)
    store.scheme = scheme
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = store.uri("bucket/run", port=free.getsockname()[1], **options)
    for work in (artifacts.read_bytes, artifacts.list_dir, open_source):
        started = time.monotonic()
        with pytest.raises(RemoteError, match=rf"{scheme}://bucket/run.*does not answer from here.*endpoint_override"):
            work(uri)
        assert time.monotonic() - started < 15


def test_a_server_that_is_silent_is_given_up_as_the_uri_says(s3: ObjectStore):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        started = time.monotonic()
        with pytest.raises(RemoteError, match="does not answer from here"):
            artifacts.read_bytes(s3.uri("bucket/a", port=silent.getsockname()[1], request_timeout=1, max_attempts=1))
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("options", "cause"),
    [({"max_attempts": "many"}, "'many'.*max_attempts"), ({"regoin": "x"}, "Unexpected query parameter.*regoin")],
)
def test_an_option_that_is_none_is_named(s3: ObjectStore, options: dict[str, str], cause: str):
    with pytest.raises(BadAddress, match=rf"s3://bucket/a.*{cause}.*Check the address"):
        artifacts.read_bytes(s3.uri("bucket/a", **options))


def test_nothing_is_written_where_a_half_written_file_could_be_read():
    with pytest.raises(StorageError, match=r"abfs://account/run.*Choose a --run-dir on s3://, gs://"):
        artifacts.write_bytes("abfs://container@account/run", b"x")


# --- what it costs -----------------------------------------------------------------------------------------------------


def test_a_small_file_is_written_by_one_request_and_read_by_three(s3: ObjectStore, s3_root: str):
    path = artifacts.join(s3_root, "a")
    artifacts.write_bytes(path, b"x")
    s3.calls()
    artifacts.write_bytes(path, b"x")
    assert [call.split()[0] for call in s3.calls()] == ["PUT"]
    artifacts.read_bytes(path)
    assert [call.split()[0] for call in s3.calls()] == ["HEAD", "GET", "HEAD"]
    artifacts.list_dir(s3_root)
    assert [call.split()[0] for call in s3.calls()] == ["GET"]


def test_one_client_serves_all_paths_of_a_bucket(s3: ObjectStore):
    first, inner = artifacts.file_system(s3.uri("bucket/a b/c%20d"))
    second, _ = artifacts.file_system(s3.uri("bucket/e"))
    other, _ = artifacts.file_system(s3.uri("bucket/e", max_attempts=2))
    assert inner == "bucket/a b/c d"
    assert first is second
    assert first is not other


# --- a whole run -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_on_s3_is_the_run_on_a_disk_and_goes_on_where_it_was_cut_off(
    ray_cluster: None, s3: ObjectStore, s3_root: str, tmp_path: Path
):
    rows = small.write_rows(tmp_path / "rows.parquet")
    there = s3.uri(f"bucket/{tmp_path.name}/rows/rows.parquet")
    artifacts.copy(rows, there)
    disk = Run(small.config(rows, tmp_path / "disk"))
    small.until_plan(disk)
    disk.release_pool()

    first = Run(small.config(there, s3_root))
    small.until_plan(first)
    first.release_pool()
    units = first.scratch("units", "score")
    commits = [name for name in artifacts.list_dir(units) if name.startswith("commit-")]
    for name in commits[len(commits) // 2 :]:  # as if the driver had died before these, and before all that follows
        artifacts.remove(artifacts.join(units, name))
    manifest = artifacts.read_json(first.path("manifest.json"))
    manifest["score"] |= {"state": "running", "artifact": "", "finished": 0.0}
    del manifest["plan"]
    artifacts.write_json(first.path("manifest.json"), manifest)

    again = Run(small.config(there, s3_root, 2))
    stages.run_all(again)
    again.release_pool()
    assert artifacts.read_json(again.path("saliency", "pass.json"))["resumed_units"] > 0
    assert small.plan_hashes(again) == small.plan_hashes(disk)

    s3.calls()
    third = Run(small.config(there, s3_root))
    stages.run_all(third)
    assert third._pool is None
    assert third.manifest.stages == again.manifest.stages
    written = {call.rpartition("/")[2].partition("-")[0] for call in s3.calls() if call.startswith(("PUT", "POST"))}
    assert written <= {"probe", ""}  # and the mark of the directory in which the probe was
    small.hashes(third)
    assert b"<html" in artifacts.read_bytes(third.path("report", "report.html"))
