"""Workers as actors: a pool takes what the cluster gains while a pass runs, and only if it may."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from torch import Tensor

from pipeline.artifacts import RemoteError, StorageError
from pipeline.data.batches import Decoder
from pipeline.data.rows import open_source
from pipeline.data.units import Units
from pipeline.execution import pool as pools
from pipeline.execution.drive import PassFailed, run_pass
from pipeline.execution.ledger import Ledger
from pipeline.execution.pool import RayPool
from pipeline.execution.worker import Pass
from pipeline.saliency.exact import Grid
from tests.data.making import image, write_parquet
from tests.execution.test_drive import Brightness

pytestmark = pytest.mark.ray


class Slow(Brightness):
    """Takes its time, so that others can come."""

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        import time

        time.sleep(0.1)
        return super().__call__(images_NCHW, labels_N)


class Explodes(Brightness):
    """NaN from the second unit on."""

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        sums = super().__call__(images_NCHW, labels_N)
        return {**sums, "red": sums["red"] * (float("nan") if labels_N[0] == 4 else 1.0)}


def a_pass(tmp_path: Path, task: Brightness) -> Pass:
    rows = write_parquet(tmp_path / "rows.parquet", [image(i) for i in range(80)], [i % 10 for i in range(80)])
    source = open_source(str(rows))
    units = Units(source.row_groups, 4)
    return Pass(
        task=task,
        source=source,
        units=units,
        decoder=Decoder(12, (0, 0, 0), (1, 1, 1), "bilinear", 1.0),
        ledger=Ledger(str(tmp_path / "units"), len(units), "fingerprint"),
        grid=None,
        micro_batch=4,
        num_classes=10,
        on_bad_row="stop",
    )


@pytest.mark.parametrize(("grow", "expected"), [(True, 3), (False, 1)])
def test_a_pool_grows_with_the_cluster_if_it_may(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grow: bool, expected: int
):
    monkeypatch.setattr(pools, "LOOK_EVERY_S", 0.0)  # the session's Ray has three CPUs
    pool = RayPool(1, "cpu", 1, grow=grow)
    try:
        result = run_pass(a_pass(tmp_path, Slow()), pool, commit_interval_s=0.1)
    finally:
        pool.close()
    assert (result.rows, result.values["rows"].item()) == (80, 80)
    assert result.workers == pool.num_workers == expected


def test_what_may_pass_by_itself_is_tried_again_and_what_would_come_again_is_not():
    assert not pools.is_fatal(RemoteError("s3://bucket/x: 503 slow down"))
    assert not pools.is_fatal(StorageError(errno.ESTALE, "stale file handle"))
    assert pools.is_fatal(StorageError(errno.ENOSPC, "no space left"))
    assert pools.is_fatal(StorageError("not the directory of the driver"))
    assert pools.is_fatal(ValueError("label out of range"))
    assert not pools.is_fatal(RuntimeError("CUDA error"))


def test_workers_of_another_kind_are_sent_away_and_the_last_one_says_why(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    work = a_pass(tmp_path, Slow())
    work.ledger.fix_grid(Grid({"red": [30]}, 52), "another CPU")
    pool = RayPool(2, "cpu", 1)
    try:
        with pytest.raises(PassFailed, match=r"this pass began on 'another CPU', and .* Use nodes of one kind"):
            run_pass(work, pool, commit_interval_s=0.1)
    finally:
        pool.close()


def test_a_row_that_gives_nan_is_named_with_its_unit(ray_cluster: None, tmp_path: Path):
    pool = RayPool(1, "cpu", 1)
    try:
        with pytest.raises(ArithmeticError, match=r"unit 1 \(file 0, row group 1, rows 0 to 3\): statistic 'red'.*NaN"):
            run_pass(a_pass(tmp_path, Explodes()), pool)
    finally:
        pool.close()
