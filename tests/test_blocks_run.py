"""A run that removes whole residual blocks: the same hashes with 1 and 2 workers, in the report, in the artifact."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import artifacts, stages
from pipeline.config import BudgetConfig, ControlsConfig, ModelConfig, ScoreConfig
from pipeline.export.artifact import load
from pipeline.models.standalone import Removed
from pipeline.run import Run
from pipeline.stages.planning import budget_inputs
from pipeline.summary import write_report
from tests.test_run import config, plan_hashes, until_plan, write_rows

pytestmark = pytest.mark.ray

NETWORK = ModelConfig(name="tests.residual:resnet", pretrained=False)
BUDGET = BudgetConfig(
    params=0.2, min_keep=0.5, max_blocks=0.7
)  # half of the channels are more than a fifth of the parameters


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


@pytest.fixture(scope="module")
def finished(ray_cluster: None, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(config(rows, tmp_path_factory.mktemp("one"), model=NETWORK, budget=BUDGET))
    stages.run_all(run)
    run.release_pool()
    return run


def test_the_network_loses_blocks_and_channels_and_meets_the_budget(finished: Run):
    plan, summary = finished.plan("ours"), write_report(finished)
    removed = [block.name for block in plan.blocks]
    assert 1 <= len(removed) <= 2
    assert 0.18 * plan.dense.params < plan.kept.params <= 0.2 * plan.dense.params
    assert summary["verify"]["max_rel_diff"] < 1e-4
    assert (summary["plan"]["removed_blocks"], summary["plan"]["num_blocks"]) == (removed, 3)
    told = f"Of 3 residual blocks that can go, {len(removed)} are removed: {', '.join(removed)}."
    assert told in Path(finished.path("report", "report.html")).read_text()
    model = load(finished.path("model"))
    assert [name for name, module in model.named_modules() if isinstance(module, Removed)] == removed
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.kept.params


def test_the_controls_remove_blocks_by_their_own_saliency(finished: Run):
    for name in ("random", "magnitude"):
        assert len(finished.plan(name).blocks) >= 1
        assert set(artifacts.read_tensors(finished.path("saliency", f"{name}.safetensors"))) == set(
            finished.graph().scored()
        )


def test_two_workers_give_the_same_hashes(finished: Run, rows: str, tmp_path: Path):
    run = Run(config(rows, tmp_path, 2, model=NETWORK, budget=BUDGET))
    until_plan(run)
    run.release_pool()
    assert plan_hashes(run) == plan_hashes(finished)


def test_a_branch_keeps_the_blocks_that_are_scored_and_may_keep_them_all(finished: Run, rows: str, tmp_path: Path):
    run = Run(config(rows, tmp_path, model=NETWORK, budget=BudgetConfig(params=0.6)))
    stages.branch(finished, run)
    until_plan(run)
    run.release_pool()
    assert not Path(run.path("units")).exists()
    assert run.plan("ours").blocks == ()
    assert write_report(run)["plan"]["num_blocks"] is None


def test_a_criterion_without_a_word_on_blocks_is_refused_at_once(ray_cluster: None, rows: str, tmp_path: Path):
    score = ScoreConfig(criterion="activation_variance", rows_per_unit=8, micro_batch=8)
    run = Run(config(rows, tmp_path, model=NETWORK, budget=BUDGET, score=score, controls=ControlsConfig(criteria=())))
    with pytest.raises(ValueError, match=r"budget.max_blocks \(0.7\).*activation_variance"):
        stages.check_early(run)


def test_where_no_block_may_go_a_stage_is_made_from_what_it_was(rows: str, tmp_path: Path):
    assert "max_blocks" not in budget_inputs(Run(config(rows, tmp_path)))
    assert budget_inputs(Run(config(rows, tmp_path, budget=BUDGET)))["max_blocks"] == 0.7
