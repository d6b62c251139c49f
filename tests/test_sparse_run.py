"""Runs that train towards zeros before they prune: what training leaves is what is cut, or masked, and what is wrong shows at once."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from pipeline import artifacts, stages
from pipeline.checks import check_run
from pipeline.config import (
    BudgetConfig,
    CalibrateConfig,
    MasksConfig,
    ModelConfig,
    ScoreConfig,
    SparsifyConfig,
    TrainingConfig,
)
from pipeline.data.batches import unit_batches
from pipeline.execution.train import METRICS
from pipeline.export.artifact import load
from pipeline.pruning.surgery import cut
from pipeline.pruning.verify import verify
from pipeline.run import Run
from pipeline.saliency.channel_rules import magnitude_l2
from pipeline.stages.calibrating import calibration_units
from pipeline.summary import write_report
from pipeline.training.calibrate import batch_norms
from pipeline.training.loop import train
from tests.test_run import config, write_rows

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Train's own

RECIPE = {
    "batch_size": 20,
    "num_streams": 2,
    "lr": 0.05,
    "warmup_epochs": 0,
    "ema_decay": 0.9,
    "checkpoint_every_steps": 3,
}
NO_BUDGET = {"budget": BudgetConfig(), "masks": MasksConfig(pattern="unstructured", keep=0.3, criterion="magnitude")}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


def sparse(rows: str, run_dir: Path, *method: str, num_workers: int = 1, epochs: int = 2, **changes: object) -> Run:
    """A run on the small ResNet that trains with `method` and then needs no more rows before it is cut; fields of `sparsify` come with
    their prefix."""
    own = {name.removeprefix("sparsify_"): changes.pop(name) for name in [*changes] if name.startswith("sparsify_")}
    values = {
        "model": ModelConfig(name="tests.residual:resnet", pretrained=False),
        "sparsify": SparsifyConfig(**{**RECIPE, "method": method, "epochs": epochs, "update_every_steps": 2, **own}),
        "score": ScoreConfig(criterion="magnitude", rows_per_unit=8, micro_batch=8),
        "budget": BudgetConfig(params=0.5),
        "calibrate": CalibrateConfig(batches=0),
    }
    return Run(config(rows, run_dir, num_workers, **{**values, **changes}))


def fit_here(model, teacher, make_batches, settings, *, steps_per_epoch, policies, fingerprint, directory, **options):
    """Ray Train's place taken by one worker in this process."""
    del options
    batches = make_batches(0, 1)
    about = {"steps_per_epoch": steps_per_epoch, "policies": policies, "fingerprint": fingerprint}
    result = train(model, teacher, batches, settings, checkpoint_dir=directory, **about)
    history = "".join(json.dumps(record) + "\n" for record in result.history)
    artifacts.write_bytes(artifacts.join(directory, METRICS), history.encode())
    return result


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but this process: a stage that needs workers fails."""
    monkeypatch.setattr("pipeline.stages.training.fit", fit_here)
    monkeypatch.setattr(Run, "connect", lambda run: None)
    monkeypatch.setattr(Run, "device", "cpu")


def until_masked(run: Run) -> Run:
    for stage in (
        stages.check_early, stages.dense, stages.trace_groups, stages.sparsify, stages.score, stages.plan,
        stages.cut_and_verify, stages.mask_weights,
    ):  # fmt: skip
        stage(run)
    return run


def state(run: Run, name: str) -> dict[str, torch.Tensor]:
    return artifacts.read_tensors(run.path("networks", f"{name}.safetensors"))


# --- channels ---------------------------------------------------------------------------------------------------------


def gated(rows: str, run_dir: Path) -> Run:
    score = ScoreConfig(criterion="hard_concrete", rows_per_unit=8, micro_batch=8)
    return until_masked(sparse(rows, run_dir, "hard_concrete", score=score, sparsify_gate_lr=0.3))


def test_gates_say_which_channels_are_cut(here: None, rows: str, tmp_path: Path):
    run = gated(rows, tmp_path)
    assert "score" not in run.manifest.stages  # no row is read for them
    plan, opened = run.plan("ours"), state(run, "sparse-statistics")
    assert (plan.criterion, run.parent) == ("hard_concrete", "sparse")
    assert 0.45 * plan.dense.params < plan.kept.params <= 0.5 * plan.dense.params
    saliency = artifacts.read_tensors(run.path("saliency", "ours.safetensors"))
    for group in plan.groups:
        assert torch.equal(saliency[group.name], opened[f"gate_open/{group.name}"].double())
        if group.removed:
            assert saliency[group.name][list(group.kept)].min() >= saliency[group.name][list(group.removed)].max()
    assert sum(len(group.removed) for group in plan.groups) > 0
    told = write_report(run)["sparsify"]
    assert (told["method"], told["epochs"]) == ("hard_concrete", 2)
    assert told["history"][-1]["zeros"] == 0  # gates go into the weights at the end
    assert told["history"][-1]["closed_gates"] > 0
    network = {name: p for name, p in run.network("sparse").named_parameters() if p.dim() > 1}
    exact = sum(int((p == 0).sum()) for p in network.values()) / sum(p.numel() for p in network.values())
    assert 0 < told["zeros"] == pytest.approx(exact)
    assert [layer["name"] for layer in told["layers"]] == [*network]
    assert "Training towards zeros" in Path(run.path("report", "report.html")).read_text()


def test_channels_that_the_group_lasso_empties_are_those_that_are_cut(here: None, rows: str, tmp_path: Path):
    budget = BudgetConfig(params=0.5, round_to=1)
    run = until_masked(sparse(rows, tmp_path, "group_lasso", epochs=4, budget=budget))
    assert run.plan("ours").scope == "flat"
    plan, network = run.plan("ours"), run.network("sparse")
    norms = magnitude_l2(run.graph(), {}, network.state_dict(), 0)
    assert all(not norms[group.name][list(group.removed)].any() for group in plan.groups)
    assert 0.45 * plan.dense.params < plan.kept.params <= 0.5 * plan.dense.params
    assert verify(cut(network, plan), network, torch.rand(4, 3, 16, 16)).max_rel < 1e-5  # nothing is lost by the cut


def test_a_branch_takes_over_what_was_trained_for_the_same_aim(here: None, rows: str, tmp_path: Path):
    old = gated(rows, tmp_path / "old")
    for name, changes, taken in (
        ("criterion", {"score": ScoreConfig(criterion="magnitude", rows_per_unit=8, micro_batch=8)}, True),
        ("budget", {"budget": BudgetConfig(params=0.4)}, False),
        ("method", {"sparsify": old.config.sparsify.model_copy(update={"gate_lr": 0.2})}, False),
        ("none", {"sparsify": SparsifyConfig(), "score": ScoreConfig(criterion="magnitude")}, False),
    ):
        new = Run(old.config.model_copy(update={"run_dir": str(tmp_path / name), **changes}))
        stages.branch(old, new)
        assert {"dense", "trace"} <= set(new.manifest.stages)
        assert ("sparsify" in new.manifest.stages) == taken
        until_masked(new)
        attempts = {stage: record.attempts for stage, record in new.manifest.stages.items()}
        assert attempts.get("sparsify") == (None if name == "none" else 1)
        if name != "none":
            same = new.weights_sha256("sparse") == old.weights_sha256("sparse")
            assert same == taken


# --- weights ----------------------------------------------------------------------------------------------------------


def require_the_same_zeros(run: Run) -> None:
    """Training and the mask stage agree to the element."""
    weights, masks = state(run, "sparse"), run.weight_masks("ours")
    assert len(masks) == 11
    for name, mask in masks.items():
        assert torch.equal(mask, weights[name] != 0)
        assert int(mask.sum()) == mask.numel() * 3 // 10


@pytest.mark.parametrize("method", ["rigl", "cubic", "dpf"])
def test_masks_are_those_that_training_has_ended_with(here: None, rows: str, tmp_path: Path, method: str):
    require_the_same_zeros(until_masked(sparse(rows, tmp_path, method, **NO_BUDGET)))


def test_gates_of_weights_say_which_are_masked(here: None, rows: str, tmp_path: Path):
    masks = MasksConfig(pattern="unstructured", keep=0.3, criterion="hard_concrete")
    run = until_masked(sparse(rows, tmp_path, "hard_concrete", budget=BudgetConfig(), masks=masks))
    opened, found = state(run, "sparse-statistics"), run.weight_masks("ours")
    kept = torch.cat([opened[f"gate_open/{name}"][mask] for name, mask in found.items()])
    removed = torch.cat([opened[f"gate_open/{name}"][~mask] for name, mask in found.items()])
    assert kept.min() >= removed.max()  # in scope global
    assert len(kept) == (len(kept) + len(removed)) * 3 // 10


def require_own_statistics(run: Run, name: str) -> None:
    """Batch norms normalise with what the calibration's rows give these very weights."""
    units, network = calibration_units(run), run.network(name)
    images = [
        batch.images_NCHW
        for unit in units
        for batch in unit_batches(run.train_rows, unit, run.input.decoder, micro_batch=32, num_classes=10)
    ]
    first, seen = next(iter(batch_norms(network).values())), []
    with first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].mean((0, 2, 3)))), torch.no_grad():
        for x in images:
            network(x)
    assert len(seen) == 2
    assert torch.allclose(first.running_mean, torch.stack(seen).mean(0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.ray
def test_a_sparse_run_keeps_its_zeros_to_the_artifact_and_does_nothing_again(
    ray_cluster: None, rows: str, tmp_path: Path
):
    calibrate = CalibrateConfig(batches=2, batch_size=32)
    run = sparse(rows, tmp_path, "rigl", **NO_BUDGET, recover=TrainingConfig(**RECIPE, epochs=1), calibrate=calibrate)
    stages.run_all(run)
    require_own_statistics(run, "sparse")
    run.release_pool()
    require_the_same_zeros(run)
    weights, masks, model = state(run, "sparse"), run.weight_masks("ours"), load(run.path("model")).state_dict()
    for name, mask in masks.items():
        assert torch.equal(state(run, "ours-calibrated")[name], weights[name])
        for final in (state(run, "ours-recovered")[name], model[name]):
            assert not final[~mask].any()
            assert not torch.equal(final, weights[name])  # trained on
    summary = write_report(run)
    removed = sum(int((~mask).sum()) for mask in masks.values())
    assert summary["pruned"]["nonzero_params"] == summary["dense"]["params"] - removed
    weighed = sum(mask.numel() for mask in masks.values())
    for stage in ("sparsify", "recover"):  # every weight is masked, but for the tensors of one dimension
        assert summary[stage]["zeros"] == pytest.approx(removed / weighed)
        assert {layer["name"] for layer in summary[stage]["layers"]} == {*masks}
    assert f"model: {removed:,} of its weights are masked, and zero" in list(check_run(run))
    again = Run(run.config)
    stages.run_all(again)
    assert again._pool is None
    assert {record.attempts for record in again.manifest.stages.values()} == {1}


# --- deaths -----------------------------------------------------------------------------------------------------------


def training_workers() -> list[int]:
    """Process ids of Ray Train's workers below this process."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:  # gone meanwhile
                continue

    def is_mine(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, name in names.items() if "TrainWorker" in name and is_mine(pid)]


@pytest.mark.slow
@pytest.mark.ray
def test_a_worker_killed_in_sparse_training_changes_no_bit(ray_cluster: None, rows: str, tmp_path: Path):
    quiet, disturbed = (sparse(rows, tmp_path / name, "rigl", num_workers=2, **NO_BUDGET, epochs=4) for name in "ab")
    killed: list[int] = []

    def kill_after_the_first_checkpoint() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            if any(Path(disturbed.dir).glob("checkpoints/sparsify-*/step-*")):
                killed.extend(training_workers()[-1:])
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.001)

    killer = threading.Thread(target=kill_after_the_first_checkpoint)
    for run in (quiet, disturbed):
        if run is disturbed:
            killer.start()
        for stage in (stages.check_early, stages.dense, stages.trace_groups, stages.sparsify):
            stage(run)
    killer.join()
    assert killed
    assert quiet.weights_sha256("sparse") == disturbed.weights_sha256("sparse")


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": ("rigll",)}, "'rigll' is unknown; known methods: l1_sign, l1_prox, .*hard_concrete, .*rigl, dpf"),
        ({"method": ("rigl",)}, "rigl masks weights: give masks.pattern, and masks.keep"),
        ({"method": ("rigl",), "masks": MasksConfig(pattern="2:4")}, "masks.pattern is 2:4. Choose unstructured, or"),
        ({"method": ("cubic",), "masks": MasksConfig(pattern="unstructured"), "budget": BudgetConfig(macs=0.5)},
         r"needs masks\.keep"),
        ({"method": ("group_lasso",), **NO_BUDGET}, "group_lasso acts on channels: give budget.params or budget.macs"),
        ({"method": ("l1_prox",), "score": ScoreConfig(criterion="hard_concrete")},
         "'hard_concrete' reads gates that are trained: give sparsify.method hard_concrete"),
        ({"method": ("hard_concrete",), "masks": MasksConfig(pattern="unstructured", criterion="hard_concrete")},
         "with a budget for channels the gates are theirs"),
        ({"method": ("hard_concrete",), "budget": BudgetConfig(), "masks": MasksConfig(pattern="2:4")},
         "needs an aim: budget.params or budget.macs for channels, or masks.keep"),
    ],
)  # fmt: skip
def test_what_sparse_training_lacks_shows_before_any_work(
    rows: str, tmp_path: Path, changes: dict[str, object], words: str
):
    run = sparse(rows, tmp_path, *changes.pop("method"), **changes)
    with pytest.raises(ValueError, match=words):
        stages.check_early(run)
    assert run.manifest.stages == {}
    assert not Path(run.path("config.yaml")).exists()
