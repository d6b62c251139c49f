"""Where the time of a run goes that is no work: `python -m benchmarks.startup`.

Runs the demo in a new directory and tells, from its manifest and its files, the seconds from the start of the process to the first stage
and to the first unit of scoring, between stages, and of each stage outside its work: in scoring until the pilot unit is known, in training
before the first step and after the last. Beside it what such times are made of, each measured in a process of its own: imports, a local
Ray cluster and its first worker.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from typing import Any

import ray
import tyro

from benchmarks.measuring import in_fresh_process, versions
from pipeline import artifacts
from pipeline.artifacts import Manifest, StageRecord
from pipeline.execution.pool import RayPool, connect
from pipeline.execution.train import read_history

TRAINING = ("dense", "recover")


def measure() -> dict[str, Any]:
    """Seconds of everything that is no work, in one run of the demo."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, "-m", "jobs.prune_demo", "--run-dir", folder, "--quiet"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        ended = time.time()
        stages = Manifest(folder).stages
        first = min(stages.values(), key=lambda record: record.started)
        found = {
            "whole_run_s": ended - started,
            "to_first_stage_s": first.started - started,
            "between_stages_s": _between(stages),
            "to_first_unit_s": _pilot(folder, stages["score"]),
            "outside_training_s": {name: _outside(folder, name, stages[name]) for name in TRAINING},
            "after_last_stage_s": ended - max(record.finished for record in stages.values()),
        }
    parts = {"imports_s": _imports(), **in_fresh_process(_ray)}
    return {**found, "parts": parts, "versions": versions("torch", "ray", "timm")}


def _between(stages: dict[str, StageRecord]) -> dict[str, float]:
    """Before each stage, since the one before it has ended."""
    order = sorted(stages.items(), key=lambda item: item[1].started)
    return {name: record.started - before.finished for (_, before), (name, record) in pairwise(order)}


def _pilot(folder: str, record: StageRecord) -> float:
    """Of scoring: until the first unit is computed and its grid is written."""
    grid = f"{folder}/units/score-{artifacts.short(record.fingerprint)}/grid.json"
    return os.stat(grid).st_mtime - record.started


def _outside(folder: str, stage: str, record: StageRecord) -> float:
    history = read_history(f"{folder}/checkpoints/{stage}-{artifacts.short(record.fingerprint)}")
    return float(record.seconds - history[-1]["seconds"])


# --- parts ------------------------------------------------------------------------------------------------------------


def _imports() -> float:
    """A process that does nothing but import what a job imports."""
    started = time.time()
    subprocess.run([sys.executable, "-c", "import jobs.prune_demo"], check=True)
    return time.time() - started


def _ray() -> dict[str, float]:
    """A local cluster, then a worker that is ready for a pass."""
    started = time.time()
    connect(None, num_cpus=2)
    connected = time.time()
    pool = RayPool(1, "cpu", threads=1)
    pool.call(time.time)
    ready = time.time()
    pool.close()
    ray.shutdown()
    return {"ray_init_s": connected - started, "first_worker_s": ready - connected}


if __name__ == "__main__":
    print(json.dumps(tyro.cli(measure), indent=1))
