"""A run whose workers hold every network together, each some rows of it: the saliency, the plan and the masks of one that does not."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifacts, stages
from pipeline.config import (
    CalibrateConfig,
    DataConfig,
    MasksConfig,
    RunConfig,
    ScoreConfig,
    SparsifyConfig,
    TrainingConfig,
    WorkersConfig,
)
from pipeline.run import Run
from pipeline.summary import write_report
from tests.test_run import config, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Ray Train's own

TOP1_NOISE = 0.1
"""Of one epoch on 200 rows, whose sums round in another order."""


def changed(rows: str, run_dir: Path, shard_over: int, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "data": DataConfig(train=rows, val=rows, image_size=64, crop_fraction=1.0),
        "score": ScoreConfig(rows_per_unit=12, micro_batch=4),  # a team of two has an idle member in every other step
        "masks": MasksConfig(pattern="unstructured", keep=0.5),
        "calibrate": CalibrateConfig(
            batches=5, batch_size=40
        ),  # all rows: units of a team are larger, and would be others
        "recover": TrainingConfig(
            epochs=1,
            batch_size=20,
            num_streams=2,
            lr=0.01,
            warmup_epochs=0,
            distill_weight=0.5,
            checkpoint_every_steps=3,
        ),
        "workers": WorkersConfig(num_workers=2, shard_over=shard_over, commit_interval_s=0.1),
    }
    return config(rows, run_dir, **{**values, **changes})


def kill_a_follower(run: Run, found: list[int]) -> None:
    """As soon as a commit is there."""
    while not artifacts.list_dir(run.path("units")) or not list(Path(run.dir).glob("units/score-*/commit-*")):
        time.sleep(0.01)
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        if cmdline.read_bytes().startswith(b"ray::_Follower"):
            found.append(int(cmdline.parent.name))
            os.kill(found[0], signal.SIGKILL)
            return


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_that_hold_networks_together_find_what_the_others_find(ray_cluster: None, tmp_path: Path):
    rows = write_rows(tmp_path / "rows.parquet")
    whole = Run(changed(rows, tmp_path / "whole", 1))
    stages.run_all(whole)
    whole.release_pool()
    sharded, killed = Run(changed(rows, tmp_path / "sharded", 2)), list[int]()
    saboteur = threading.Thread(target=kill_a_follower, args=(sharded, killed))
    saboteur.start()
    stages.run_all(sharded)
    saboteur.join()
    sharded.release_pool()
    a, b = (artifacts.read_tensors(run.path("saliency", "statistics.safetensors")) for run in (whole, sharded))
    assert {name: tensor.shape for name, tensor in a.items()} == {name: tensor.shape for name, tensor in b.items()}
    for name, tensor in a.items():
        assert (tensor - b[name]).double().norm() <= 1e-5 * tensor.double().norm(), name
    expected, found = write_report(whole), write_report(sharded)
    assert [found[name]["sha256"] for name in ("plan", "masks", "weight_masks")] == [
        expected[name]["sha256"] for name in ("plan", "masks", "weight_masks")
    ]
    assert len(killed) == 1
    assert (found["saliency"]["rows"], found["saliency"]["lost_workers"]) == (200, 1)
    assert abs(found["pruned"]["top1"] - expected["pruned"]["top1"]) <= TOP1_NOISE
    before = [run["pruned"]["top1_before_recovery"] for run in (found, expected)]
    assert abs(before[0] - before[1]) <= 1 / 200


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": WorkersConfig(num_workers=3, shard_over=2)}, "num_workers .3. is no multiple"),
        ({"recover": TrainingConfig(epochs=1, num_streams=1)}, "recover.num_streams .1. feeds fewer"),
        ({"score": ScoreConfig(criterion="grasp")}, "multiplies with the Hessian"),
        ({"sparsify": SparsifyConfig(epochs=1, method="group_lasso")}, r"sparsify.method \(group_lasso\) needs whole"),
    ],
)
def test_what_needs_whole_weights_is_refused_before_everything(tmp_path: Path, changes: dict[str, Any], words: str):
    rows = write_rows(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=words):
        stages.check_early(Run(changed(rows, tmp_path / "run", 2, **changes)))
