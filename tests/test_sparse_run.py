"""Runs that train towards zeros before they prune: what training leaves is what is cut, or masked, and what is wrong shows at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline import artifacts, stages
from pipeline.checks import check_run
from pipeline.config import BudgetConfig, MasksConfig, ModelConfig, ScoreConfig, SparsifyConfig, TrainingConfig
from pipeline.export.artifact import load
from pipeline.run import Run
from pipeline.summary import write_report
from tests.test_run import config, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # Ray Train's own

RECIPE = {"batch_size": 20, "num_streams": 2, "lr": 0.05, "warmup_epochs": 0, "ema_decay": 0.9, "checkpoint_every_steps": 3}
NO_BUDGET = {"budget": BudgetConfig(), "masks": MasksConfig(pattern="unstructured", keep=0.3, criterion="magnitude")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


def sparse(rows: str, run_dir: Path, *method: str, num_workers: int = 1, epochs: int = 2, **changes: object) -> Run:
    """A run on the small ResNet that trains with `method` and scores without rows; fields of `sparsify` come with their prefix."""
    own = {name.removeprefix("sparsify_"): changes.pop(name) for name in [*changes] if name.startswith("sparsify_")}
    values = {
        "model": ModelConfig(name="tests.residual:resnet", pretrained=False),
        "sparsify": SparsifyConfig(**{**RECIPE, "method": method, "epochs": epochs, "update_every_steps": 2, **own}),
        "score": ScoreConfig(criterion="magnitude", rows_per_unit=8, micro_batch=8),
        "budget": BudgetConfig(params=0.5),
    }
    return Run(config(rows, run_dir, num_workers, **{**values, **changes}))


def done(run: Run) -> Run:
    stages.run_all(run)
    run.release_pool()
    return run


def state(run: Run, name: str) -> dict[str, torch.Tensor]:
    return artifacts.read_tensors(run.path("networks", f"{name}.safetensors"))


# --- channels ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(ray_cluster: None, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    score = ScoreConfig(criterion="hard_concrete", rows_per_unit=8, micro_batch=8)
    run = sparse(rows, tmp_path_factory.mktemp("gated"), "hard_concrete", score=score, sparsify_gate_lr=0.3)
    return done(run)


def test_gates_say_which_channels_are_cut(gated: Run):
    assert "score" not in gated.manifest.stages  # no row is read for them
    plan, opened = gated.plan("ours"), state(gated, "sparse-statistics")
    assert (plan.criterion, gated.parent) == ("hard_concrete", "sparse")
    assert 0.45 * plan.dense.params < plan.kept.params <= 0.5 * plan.dense.params
    saliency = artifacts.read_tensors(gated.path("saliency", "ours.safetensors"))
    for group in plan.groups:
        assert torch.equal(saliency[group.name], opened[f"gate_open/{group.name}"].double())
    E = 0
    print({g.name: (len(g.kept), g.size, [round(float(x),2) for x in saliency[g.name]]) for g in plan.groups})
    assert 0
