"""A job on a head and two worker nodes, through the job server and with a token. Nodes are killed and come, the job is stopped and submitted
again: it ends with the hashes of an undisturbed run on one machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import DataConfig, RunConfig, ScoreConfig, TrainingConfig, WorkersConfig
from pipeline.training import checkpoint
from tests.nodes import RAY, ROOT, Nodes, wait_for
from tests.test_run import config, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(3000)]

RECOVER = TrainingConfig(epochs=8, batch_size=20, num_streams=2, lr=0.01, warmup_epochs=0, checkpoint_every_steps=3)
TOP1_NOISE = 0.1
"""Training goes on with one worker of two for a while: its batch norms see other rows, and 200 rows are 20 in a tenth."""


def prepare(rows: str, run_dir: Path, **changes: object) -> list[str]:
    """The command of a run that is long enough to be disturbed."""
    run_dir.mkdir()
    values = {
        "data": DataConfig(train=rows, val=rows, image_size=96, crop_fraction=1.0),
        "score": ScoreConfig(rows_per_unit=4, micro_batch=4),
        "recover": RECOVER,
        "workers": WorkersConfig(num_workers=2, commit_interval_s=0.01),
        "quiet": False,
    }
    given: RunConfig = config(rows, run_dir, **{**values, **changes})
    (run_dir / "given.yaml").write_text(given.to_yaml())
    return [sys.executable, "-m", "jobs.prune_resnet152", "--config", str(run_dir / "given.yaml")]


def summary(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "report" / "summary.json").read_text())
    return found


def hashes(run_dir: Path) -> dict[str, str]:
    return {name: summary(run_dir)[name]["sha256"] for name in ("saliency", "plan", "masks")}


def state(run_dir: Path, stage: str) -> str | None:
    manifest = run_dir / "manifest.json"
    stages = json.loads(manifest.read_text()) if manifest.exists() else {}
    return stages[stage]["state"] if stage in stages else None


def newest_step(run_dir: Path) -> int:
    """Of the recovery; 0 before its first checkpoint."""
    places = (run_dir / "checkpoints").glob("recover-*")
    return max((step for place in places for step in checkpoint.steps_in(str(place))), default=0)


def run_undisturbed(command: list[str]) -> None:
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def test_a_job_outlives_its_nodes_and_goes_on_when_it_is_submitted_again(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.parquet")
    run_undisturbed(prepare(rows, tmp_path / "quiet"))
    run_dir = tmp_path / "disturbed"
    command = prepare(rows, run_dir)
    with Nodes() as nodes:
        nodes.add("a")
        nodes.add("b")
        first = nodes.submit("first", command)

        def running() -> bool:
            assert first.poll() is None, nodes.log("first").read_text()[-3000:]
            return True

        wait_for(lambda: running() and any(run_dir.glob("units/score-*/commit-*")), "the first commit")
        nodes.kill("a")
        assert state(run_dir, "score") == "running"
        nodes.add("c")
        wait_for(lambda: running() and newest_step(run_dir), "the first checkpoint", timeout_s=900)
        nodes.kill("b")
        last = newest_step(run_dir)
        wait_for(lambda: running() and newest_step(run_dir) > last, "one worker goes on with the training")
        stopped = nodes.ray("job", "stop", "first")
        assert stopped.returncode == 0, stopped.stdout
        first.wait(timeout=60)  # Ray's exit code of a job that was stopped is that of one that succeeded
        assert "succeeded" not in nodes.log("first").read_text()
        assert state(run_dir, "recover") == "running"
        nodes.add("d")
        last = newest_step(run_dir)
        second = nodes.submit("second", command)
        try:
            assert second.wait(timeout=900) == 0, nodes.log("second").read_text()[-3000:]
        finally:
            second.kill()
        told = nodes.log("first").read_text() + nodes.log("second").read_text()
        foreign = subprocess.run(
            [*RAY, "job", "list"],
            env={**nodes.environment(), "RAY_AUTH_MODE": "disabled"},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert hashes(run_dir) == hashes(tmp_path / "quiet")
    end, expected = summary(run_dir), summary(tmp_path / "quiet")
    assert end["saliency"]["rows"] == expected["saliency"]["rows"] == 200
    assert abs(end["pruned"]["top1"] - expected["pruned"]["top1"]) <= TOP1_NOISE
    # What was committed before the stop was not done again.
    assert "score: done before" in nodes_log(told)
    assert last >= 3
    assert foreign.returncode != 0
    assert "authentication" in (foreign.stdout + foreign.stderr).lower()


def nodes_log(text: str) -> str:
    """Lines without bars: what `ray job logs` shows."""
    assert "\r" not in text
    assert "━" not in text
    return text
