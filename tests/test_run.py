"""The whole way on a small network: the same three hashes with 1, 2 and 3 workers, with a worker killed, and after a resume."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

from pipeline import artifacts, stages
from pipeline.artifacts import StaleArtifact
from pipeline.checks import check_run
from pipeline.config import (
    BudgetConfig,
    CalibrateConfig,
    DataConfig,
    EvaluateConfig,
    ExportConfig,
    MasksConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    TrainingConfig,
    WorkersConfig,
)
from pipeline.data.batches import BadRowError
from pipeline.models.zoo import ModelError
from pipeline.pruning.masks import load_masks
from pipeline.run import Run
from pipeline.summary import write_report

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


def write_rows(path: Path, damage: dict[int, dict[str, object]] | None = None) -> str:
    """200 PNG of noise over a colour that tells the class; `damage` replaces fields of single rows."""
    random = np.random.default_rng(0)
    table = []
    for i in range(200):
        label = i % 4
        pixels = (random.random((16, 16, 3)) * 120 + 40 * label).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="PNG")
        row = {"bytes": buffer.getvalue(), "label": label, **(damage or {}).get(i, {})}
        table.append({"image": {"bytes": row["bytes"], "path": None}, "label": row["label"]})
    pq.write_table(pa.Table.from_pylist(table), path, row_group_size=64)
    return str(path)


def config(rows: str, run_dir: Path, num_workers: int = 1, **changes: object) -> RunConfig:
    values = {
        "run_dir": str(run_dir),
        "model": ModelConfig(name="resnet10t", pretrained=False, num_classes=4),
        "data": DataConfig(train=rows, val=rows, image_size=16, crop_fraction=1.0),
        "score": ScoreConfig(rows_per_unit=8, micro_batch=8),
        "budget": BudgetConfig(macs=0.5),
        "calibrate": CalibrateConfig(batches=2, batch_size=32),
        "recover": TrainingConfig(epochs=0),
        "evaluate": EvaluateConfig(batch_size=32, latency_batch=2, latency_runs=3),
        "workers": WorkersConfig(num_workers=num_workers, commit_interval_s=0.2),
        "quiet": True,
    }
    return RunConfig(**{**values, **changes})


def hashes(run: Run) -> tuple[str, str, str]:
    summary = write_report(run)
    return summary["saliency"]["sha256"], summary["plan"]["sha256"], summary["masks"]["sha256"]


def until_plan(run: Run) -> None:
    scoring = (stages.score, stages.curvature, stages.plan)
    for stage in (stages.check_early, stages.dense, stages.trace_groups, *scoring):
        stage(run)


def until_masked(run: Run) -> None:
    until_plan(run)
    for stage in (stages.cut_and_verify, stages.mask_weights):
        stage(run)


def plan_hashes(run: Run) -> tuple[str, str, bytes]:
    saliency = artifacts.read_json(run.path("saliency", "pass.json"))["sha256"]
    return saliency, run.plan("ours").sha256(), artifacts.read_bytes(run.path("masks.safetensors"))


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(config(rows, tmp_path_factory.mktemp("one")))
    stages.run_all(run)
    run.release_pool()
    return run


def test_the_run_leaves_a_report_and_a_network_that_meets_the_budget(undisturbed: Run):
    summary = write_report(undisturbed)
    assert summary["saliency"]["rows"] == 200
    assert 0.45 < summary["pruned"]["macs"] / summary["dense"]["macs"] <= 0.5
    assert summary["verify"]["max_rel_diff"] < 1e-4
    assert "<html" in Path(undisturbed.path("report", "report.html")).read_text()
    assert json.loads(Path(undisturbed.path("report", "summary.json")).read_text())["pruned"]["top1"] is None


@pytest.mark.parametrize("num_workers", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_hashes_do_not_depend_on_the_number_of_workers(undisturbed: Run, rows: str, tmp_path: Path, num_workers: int):
    run = Run(config(rows, tmp_path, num_workers))
    until_plan(run)
    run.release_pool()
    assert plan_hashes(run) == plan_hashes(undisturbed)


def test_a_killed_worker_changes_no_bit(undisturbed: Run, rows: str, tmp_path: Path):
    run = Run(config(rows, tmp_path, 2))
    pids = [run.pool.call(os.getpid)]

    def kill_after_the_first_commit() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if any(Path(run.dir).glob("units/score-*/commit-*")):
                os.kill(pids[0], signal.SIGKILL)
                return
            time.sleep(0.001)

    killer = threading.Thread(target=kill_after_the_first_commit)
    killer.start()
    until_plan(run)
    killer.join()
    run.release_pool()
    assert plan_hashes(run) == plan_hashes(undisturbed)


def test_a_run_that_was_cut_off_while_scoring_goes_on_from_its_commits(undisturbed: Run, rows: str, tmp_path: Path):
    first = Run(config(rows, tmp_path, 1))
    until_plan(first)
    first.release_pool()
    units = first.scratch("units", "score")
    commits = [name for name in artifacts.list_dir(units) if name.startswith("commit-")]
    for name in commits[len(commits) // 2 :]:  # as if the driver had died before these, and before all that follows
        artifacts.remove(artifacts.join(units, name))
    manifest = artifacts.read_json(first.path("manifest.json"))
    manifest["score"] |= {"state": "running", "artifact": "", "finished": 0.0}
    del manifest["plan"]
    artifacts.write_json(first.path("manifest.json"), manifest)
    again = Run(config(rows, tmp_path, 2))
    until_plan(again)
    again.release_pool()
    assert artifacts.read_json(again.path("saliency", "pass.json"))["resumed_units"] > 0
    assert plan_hashes(again) == plan_hashes(undisturbed)


def test_a_finished_run_does_nothing_again(undisturbed: Run, rows: str):
    again = Run(config(rows, Path(undisturbed.dir)))
    stages.run_all(again)
    assert hashes(again) == hashes(undisturbed)
    assert again._pool is None


def test_a_finished_run_goes_on_to_other_runtimes(
    undisturbed: Run, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.training.latency.WARMUP_S", 0.0)
    shutil.copytree(undisturbed.dir, tmp_path / "run")
    done = set(undisturbed.manifest.stages)
    wanted = config(rows, tmp_path / "run", export=ExportConfig(onnx=True, program=True))
    for _ in range(2):
        run = Run(wanted)
        run._pool = SimpleNamespace(call=lambda function, *args: function(*args))  # a worker in this process
        stages.run_all(run)
    assert set(run.manifest.stages) - done == {"onnx-latency", "export-onnx", "export-program"}
    assert {record.attempts for record in run.manifest.stages.values()} == {1}
    summary = write_report(run)
    assert [set(summary[name]["onnx_latency_ms"]) for name in ("dense", "pruned")] == [{"1", "2"}, {"1", "2"}]
    assert summary["controls"]["random"]["onnx_latency_ms"] == {}
    lines = list(check_run(run))
    assert [line.split(" on a row")[0] for line in lines[-2:]] == [
        "model.onnx: equals the model",
        "model.pt2: equals the model",
    ]


def test_packages_that_are_missing_show_at_once(
    ray_cluster: None, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.export.onnx.find_spec", lambda name: None)
    run = Run(config(rows, tmp_path, export=ExportConfig(onnx=True)))
    with pytest.raises(ValueError, match=r"gradient-pruning-pipeline\[export\]"):
        stages.check_early(run)
    stages.check_early(Run(config(rows, tmp_path, export=ExportConfig(program=True))))


def test_a_report_of_half_a_run_leaves_open_what_is_not_known(undisturbed: Run, rows: str, tmp_path: Path):
    run = Run(config(rows, tmp_path))
    stages.check_early(run)
    assert write_report(run)["plan"]["sha256"] is None
    until_plan(run)
    run.release_pool()
    summary = write_report(run)
    assert hashes(run) == hashes(undisturbed)
    assert summary["pruned"]["params"] < summary["dense"]["params"]
    assert (summary["pruned"]["top1_before_recovery"], summary["per_class"]) == (None, [])


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (16, 16, 3), np.uint8)).save(buffer, format="JPEG")
    return buffer.getvalue()[:-200]


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ({"bytes": b"only words"}, "image"),
        pytest.param({"bytes": truncated_jpeg()}, "truncated", marks=pytest.mark.slow),
        pytest.param({"label": 1000}, r"label 1000 is not in 0\.\.3", marks=pytest.mark.slow),
        pytest.param({"label": None}, "label", marks=pytest.mark.slow),
    ],
)
def test_a_bad_row_stops_by_name_and_skipping_it_goes_on_from_there(
    ray_cluster: None, tmp_path: Path, damage: dict[str, object], cause: str
):
    train = write_rows(tmp_path / "train.parquet", damage={150: damage})
    data = DataConfig(train=train, val=train, image_size=16, crop_fraction=1.0)
    run = Run(config(train, tmp_path / "run", data=data))
    with pytest.raises(BadRowError, match=cause) as error:
        until_plan(run)
    run.release_pool()
    assert all(word in str(error.value) for word in ("train.parquet", "150", "data.on_bad_row=skip"))
    skipping = data.model_copy(update={"on_bad_row": "skip", "max_bad_fraction": 0.01})
    again = Run(config(train, tmp_path / "run", data=skipping))
    until_plan(again)
    again.release_pool()
    about = artifacts.read_json(again.path("saliency", "pass.json"))
    assert about["rows"] == 199
    assert [bad["row"] for bad in about["bad_rows"]] == [150]


def test_a_budget_out_of_reach_shows_before_the_scoring(ray_cluster: None, rows: str, tmp_path: Path):
    run = Run(config(rows, tmp_path / "run", budget=BudgetConfig(params=0.001)))
    with pytest.raises(ValueError, match="min_keep"):
        until_plan(run)
    assert "score" not in run.manifest.stages


def test_weights_that_are_not_finite_are_refused_before_any_work(rows: str, tmp_path: Path):
    state = timm.create_model("resnet10t", num_classes=4).state_dict()
    state["fc.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    model = ModelConfig(name="resnet10t", pretrained=False, num_classes=4, checkpoint=str(tmp_path / "nan.safetensors"))
    run = Run(config(rows, tmp_path / "run", model=model))
    with pytest.raises(ModelError, match=r"fc\.weight"):
        until_plan(run)
    assert not artifacts.exists(run.path("networks", "dense.safetensors"))


def test_another_budget_and_criterion_take_over_the_statistics(undisturbed: Run, rows: str, tmp_path: Path):
    changes = {
        "budget": BudgetConfig(params=0.6),
        "score": ScoreConfig(criterion="fisher", rows_per_unit=8, micro_batch=8),
    }
    run = Run(config(rows, tmp_path, **changes))
    stages.branch(undisturbed, run)
    until_plan(run)
    run.release_pool()
    assert not Path(run.path("units")).exists()
    assert artifacts.read_json(run.path("saliency", "pass.json")) == artifacts.read_json(
        undisturbed.path("saliency", "pass.json")
    )
    assert run.plan("ours").criterion == "fisher"
    assert run.plan("ours").kept.params <= 0.6 * run.plan("ours").dense.params


def test_one_pass_serves_every_criterion_and_mask(ray_cluster: None, rows: str, tmp_path: Path):
    every = ScoreConfig(rows_per_unit=8, micro_batch=8, statistics=("weights", "inputs", "curvature"), num_rows=64)
    first = Run(config(rows, tmp_path / "first", num_workers=2, score=every, masks=MasksConfig(pattern="2:4")))
    until_masked(first)
    first.release_pool()
    masks = load_masks(first.path("weight_masks", "ours.safetensors"))
    about = artifacts.read_json(first.path("weight_masks.json"))["ours"]
    assert all(bool((m.unflatten(1, (-1, 4)).sum(2) == 2).all()) for m in masks.values())
    assert about["kept"] * 2 == about["weights"]
    assert "conv1.0.weight" in about["whole"]  # three input channels
    masked = artifacts.read_tensors(first.path("networks", "ours-masked.safetensors"))
    assert all(bool((masked[name][~mask] == 0).all()) for name, mask in masks.items())
    found = {}
    for names, pattern, keep in (
        (("obd", "taylor"), "unstructured", 0.5),
        (("grasp",), "block:4", 0.25),
        (("activation_variance",), "4:8", None),
    ):
        criterion = names if names != ("activation_variance",) else ("wanda",)
        changed = {
            "score": every.model_copy(update={"criterion": names}),
            "masks": MasksConfig(pattern=pattern, keep=keep, criterion=tuple(n for n in criterion if n != "taylor")),
        }
        run = Run(config(rows, tmp_path / names[0], **changed))
        stages.branch(first, run)
        until_masked(run)
        assert run._pool is None  # nobody computed anything
        found[names[0]] = (run.plan("ours").criterion, run.plan("ours").scope)
        kept = sum(int(mask.sum()) for mask in run.weight_masks("ours").values())
        total = artifacts.read_json(run.path("weight_masks.json"))["ours"]["weights"]
        exact = total * (keep or 0.5)
        assert exact - 4 < kept <= exact
    assert found == {
        "obd": ("obd + taylor", "flat"),
        "grasp": ("grasp", "global"),
        "activation_variance": ("activation_variance", "layer"),
    }


@pytest.mark.slow
@pytest.mark.parametrize("budget", [{"params": 0.25}, {}])
def test_a_masked_run_keeps_its_zeros_to_the_end_and_tells_them(
    ray_cluster: None, rows: str, tmp_path: Path, budget: dict[str, float]
):
    masks = MasksConfig(pattern="unstructured", scope="global", keep=None if budget else 0.25)
    run = Run(config(rows, tmp_path, budget=BudgetConfig(**budget), masks=masks))
    stages.run_all(run)
    run.release_pool()
    summary = write_report(run)
    assert summary["saliency"]["criterion"] == ("taylor" if budget else "snip_abs")
    assert summary["weight_masks"]["sha256"] == artifacts.read_json(run.path("weight_masks.json"))["ours"]["sha256"]
    for name, told in (("ours", summary["pruned"]), *summary["controls"].items()):
        state = artifacts.read_tensors(run.path("networks", f"{name}-calibrated.safetensors"))
        removed = {key: ~mask for key, mask in run.weight_masks(name).items()}
        assert not any(bool(state[key][mask].any()) for key, mask in removed.items())
        assert told["nonzero_params"] == told["params"] - sum(int(mask.sum()) for mask in removed.values())
        assert told["params"] < summary["dense"]["params"] if budget else told["params"] == summary["dense"]["params"]
    if budget:
        assert summary["pruned"]["nonzero_params"] == summary["dense"]["params"] // 4
    told = artifacts.read_json(run.path("model", "architecture.json"))["extra"]["weight_masks"]
    assert told["nonzero"] == summary["pruned"]["nonzero_params"]
    assert any("of its weights are masked, and zero" in line for line in check_run(run))
    assert "non-zero parameters" in Path(run.path("report", "report.html")).read_text()


def test_the_report_says_how_the_plan_settles(undisturbed: Run):
    found = artifacts.read_json(undisturbed.path("saliency", "stability.json"))
    assert [sample["rows"] for sample in found["curve"]] == [
        104,
        56,
        32,
        16,
    ]  # units of 8 rows, every 2nd, 4th, 8th, 16th
    assert all(0 <= sample["plan_change"] < 1 for sample in found["curve"])
    assert found["curve"][0]["rank_correlation"] > found["curve"][-1]["rank_correlation"] > 0
    assert 0 < found["relative_standard_error"]["median"] < found["relative_standard_error"]["p90"]
    summary = write_report(undisturbed)
    assert [sample["rows"] for sample in summary["stability"]["curve"]] == [16, 32, 56, 104]
    assert "How the plan settles" in Path(undisturbed.path("report", "report.html")).read_text()


@pytest.mark.parametrize("num_workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_pass_ends_when_the_plan_is_stable_whoever_computes_it(
    ray_cluster: None, rows: str, tmp_path: Path, num_workers: int
):
    score = ScoreConfig(rows_per_unit=4, micro_batch=4, stop_when_stable=0.6)
    run = Run(config(rows, tmp_path, num_workers, score=score))
    until_plan(run)
    run.release_pool()
    about = artifacts.read_json(run.path("saliency", "pass.json"))
    assert (about["rows"], about["units"], about["stride"]) == (100, 25, 2)
    sha256 = artifacts.read_json(run.path("saliency", "pass.json"))["sha256"]
    other = Run(config(rows, tmp_path / "branch", num_workers, score=score, budget=BudgetConfig(macs=0.6)))
    stages.branch(run, other)  # a sample that is there serves another budget, too
    until_plan(other)
    assert other._pool is None
    assert artifacts.read_json(other.path("saliency", "pass.json"))["sha256"] == sha256
    strict = ScoreConfig(rows_per_unit=4, micro_batch=4, stop_when_stable=0.001)
    whole = Run(config(rows, tmp_path / "whole", num_workers, score=strict))
    until_plan(whole)
    whole.release_pool()
    assert artifacts.read_json(whole.path("saliency", "pass.json"))["rows"] == 200


class Begins(Exception):
    pass


def begins(*args: object, **options: object) -> None:
    raise Begins


def other_threads(run_dir: Path, patch: pytest.MonkeyPatch) -> dict[str, object]:
    return {"workers": WorkersConfig(num_workers=1, threads=2)}


def other_torch(run_dir: Path, patch: pytest.MonkeyPatch) -> dict[str, object]:
    patch.setattr("torch.__version__", "9.9.9")
    return {}


def other_weights(run_dir: Path, patch: pytest.MonkeyPatch) -> dict[str, object]:
    path = str(run_dir / "networks" / "dense.safetensors")
    state = artifacts.read_tensors(path)
    state["fc.weight"][0, 0] += 1e-3
    artifacts.write_tensors(path, state)
    return {}


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (other_threads, "threads: 1 -> 2"),
        (other_torch, r"versions\.torch: '.*' -> '9\.9\.9'"),
        (other_weights, "weights: '.*' -> '.*'"),
    ],
)
def test_what_changes_the_bits_is_refused_when_done_and_reported_when_begun(
    undisturbed: Run, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, change, cause: str
):
    shutil.copytree(undisturbed.dir, tmp_path / "run")
    run = Run(config(rows, tmp_path / "run", **change(tmp_path / "run", monkeypatch)))
    with pytest.raises(StaleArtifact, match=f"'score' was made from .*{cause}.*another --run-dir"):
        stages.score(run)
    manifest = artifacts.read_json(run.path("manifest.json"))
    manifest["score"] |= {"state": "running", "artifact": "", "finished": 0.0}
    artifacts.write_json(run.path("manifest.json"), manifest)
    begun = Run(run.config.model_copy(update={"quiet": False}))
    monkeypatch.setattr(Run, "data_pass", begins)
    with pytest.raises(Begins):
        stages.score(begun)
    assert re.search(f"score: was begun with other values, begins anew .*{cause}", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_movement_is_collected_while_the_dense_network_is_trained(ray_cluster: None, rows: str, tmp_path: Path):
    training = TrainingConfig(epochs=1, batch_size=32, num_streams=4, warmup_epochs=0.1, lr=0.01)
    score = ScoreConfig(criterion="movement", rows_per_unit=8, micro_batch=8)
    run = Run(config(rows, tmp_path, 2, train=training, score=score))
    until_plan(run)
    run.release_pool()
    assert "score" not in run.manifest.stages  # no row is read for it
    assert run.plan("ours").criterion == "movement"
    with pytest.raises(
        ValueError, match=r"'movement' is summed while the dense network is trained: give train\.epochs"
    ):
        stages.check_early(Run(config(rows, tmp_path / "untrained", score=score)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"masks": MasksConfig(pattern="2:3:4")}, "pattern '2:3:4' is unknown"),
        ({"masks": MasksConfig(pattern="unstructured")}, r"budget.macs \(0.5\) needs masks.keep"),
        ({"masks": MasksConfig(pattern="2:4", criterion="taylor")}, "'taylor' has no rule for weights"),
        ({"score": ScoreConfig(criterion=("taylor", "tailor"))}, "'tailor' is unknown"),
        (
            {"score": ScoreConfig(criterion="snip", stop_when_stable=0.1)},
            "stop_when_stable goes with .* reads grad_sum",
        ),
        ({"score": ScoreConfig(criterion="magnitude", stop_when_stable=0.1)}, "reads no rows"),
        (
            {"score": ScoreConfig(stop_when_stable=0.1), "masks": MasksConfig(pattern="2:4", criterion="wanda")},
            "reads input_square",
        ),
        ({"score": ScoreConfig(criterion="taylor", criterion_weights=(1.0, 2.0))}, "one positive number for each"),
    ],
)
def test_what_cannot_be_scored_or_masked_shows_at_once(
    ray_cluster: None, rows: str, tmp_path: Path, changes: dict[str, object], words: str
):
    run = Run(config(rows, tmp_path, **changes))
    with pytest.raises(ValueError, match=words):
        stages.check_early(run)
    assert run.manifest.stages == {}


def test_a_run_directory_of_another_network_is_refused_by_name(undisturbed: Run, rows: str):
    other = Run(
        config(rows, Path(undisturbed.dir), model=ModelConfig(name="resnet14t", pretrained=False, num_classes=4))
    )
    with pytest.raises(StaleArtifact, match="resnet10t' -> 'resnet14t"):
        stages.run_all(other)
