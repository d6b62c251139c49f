"""kill -9 of the whole driver in every long stage, then the same command again: it ends with the hashes of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config import RunConfig, SparsifyConfig, TrainingConfig, WorkersConfig
from tests.test_run import config, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

STAGES = ["dense", "sparsify", "score", "calibrate", "evaluate-before", "recover", "evaluate-after"]


def start(run_dir: Path) -> subprocess.Popen[bytes]:
    """The job, with a Ray of its own."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"} | {"RAY_ADDRESS": ""}
    command = [sys.executable, "-m", "jobs.prune_resnet152", "--config", str(run_dir / "given.yaml")]
    return subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE)


def prepare(rows: str, run_dir: Path) -> None:
    run_dir.mkdir()
    training = TrainingConfig(
        epochs=1, batch_size=20, num_streams=2, lr=0.01, warmup_epochs=0, checkpoint_every_steps=3
    )
    given: RunConfig = config(
        rows,
        run_dir,
        train=training,
        sparsify=SparsifyConfig(**training.model_dump(), method="hard_concrete", update_every_steps=2),
        recover=training,
        workers=WorkersConfig(num_workers=2, commit_interval_s=0.01),
    )
    (run_dir / "given.yaml").write_text(given.to_yaml())


def finish(run_dir: Path) -> dict[str, str]:
    driver = start(run_dir)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors.decode()[-3000:]
    summary = json.loads((run_dir / "report" / "summary.json").read_text())
    assert summary["saliency"]["rows"] == 200
    return {name: summary[name]["sha256"] for name in ("saliency", "plan", "masks")}


def kill_in(stage: str, run_dir: Path) -> None:
    """SIGKILL as soon as the stage has something on storage, or has run for two seconds."""
    places = {name: f"checkpoints/{name}-*/step-*" for name in ("dense", "sparsify", "recover")}
    driver = start(run_dir)
    manifest, began = run_dir / "manifest.json", None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        record = json.loads(manifest.read_text()).get(stage) if manifest.exists() else None
        if record and record["state"] == "running":
            began = began or time.monotonic()
            if any(run_dir.glob(places.get(stage, f"units/{stage}-*/commit-*"))) or time.monotonic() - began > 2:
                break
        time.sleep(0.002)
    driver.send_signal(signal.SIGKILL)
    driver.communicate(timeout=30)
    assert driver.returncode == -signal.SIGKILL, f"the driver ended before stage {stage} could be disturbed"


def test_a_driver_killed_in_every_stage_ends_with_the_same_hashes(tmp_path: Path):
    rows = write_rows(tmp_path / "rows.parquet")
    prepare(rows, tmp_path / "quiet")
    expected = finish(tmp_path / "quiet")
    disturbed = tmp_path / "disturbed"
    prepare(rows, disturbed)
    for stage in STAGES:
        kill_in(stage, disturbed)
    assert finish(disturbed) == expected
    stages = json.loads((disturbed / "manifest.json").read_text())
    assert all(stages[stage]["attempts"] > 1 for stage in STAGES)
