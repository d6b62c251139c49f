"""A run whose masked, cut network is quantised: size, accuracy and time beside the dense one; a resume does nothing again."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline import artifacts, stages
from pipeline.artifacts import StaleArtifact
from pipeline.checks import check_run
from pipeline.config import BudgetConfig, ExportConfig, MasksConfig, ModelConfig, RunConfig
from pipeline.run import Run
from pipeline.stages.quantising import quantise
from pipeline.summary import write_report
from tests.test_run import config, write_rows

pytestmark = pytest.mark.ray

STAGES = ("export-int8", "evaluate-int8", "compression")


def wanted(rows: str, run_dir: Path, num_workers: int = 1) -> RunConfig:
    return config(
        rows,
        run_dir,
        num_workers,
        model=ModelConfig(name="tests.residual:resnet", pretrained=False),
        budget=BudgetConfig(params=0.6, min_keep=0.25),
        masks=MasksConfig(pattern="2:4", criterion="magnitude"),
        export=ExportConfig(int8=True, int8_rows=40),
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


@pytest.fixture(scope="module")
def finished(ray_cluster: None, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(wanted(rows, tmp_path_factory.mktemp("one")))
    stages.run_all(run)
    run.release_pool()
    return run


def test_the_three_forms_stand_side_by_side(finished: Run):
    found = artifacts.read_json(finished.path("compression.json"))
    forms = [found[name] for name in ("dense", "cut", "cut_int8")]
    assert (found["rows"], found["calibration_rows"], found["threads"], found["runs"]) == (200, 40, 1, 3)
    assert forms[0]["bytes"] > forms[1]["bytes"] > forms[2]["bytes"]
    assert forms[2]["bytes"] == Path(finished.path("model", "model-int8.onnx")).stat().st_size
    before = artifacts.read_json(finished.path("evaluation", "before.json"))["models"]
    assert [form["top1"] for form in forms[:2]] == [before["dense"]["top1"], before["ours"]["top1"]]
    assert 0 <= forms[2]["top1"] <= 1
    assert (forms[1]["agreement"], forms[2]["agreement"] > 0.9) == (1.0, True)
    assert [set(form["latency_ms"]) for form in forms] == [{"1", "2"}] * 3
    assert all(ms > 0 for form in forms for ms in form["latency_ms"].values())


def test_masked_weights_are_zero_in_the_quantised_file(finished: Run):
    graph = onnx.load(finished.path("model", "model-int8.onnx")).graph
    stored = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    masks = finished.weight_masks("ours")
    assert masks
    for name, mask in masks.items():
        quantised = stored[f"{name}_quantized"]
        assert quantised.dtype == np.int8
        assert not quantised[~mask.numpy()].any()


def test_the_report_shows_them_and_verify_knows_the_file(finished: Run, tmp_path: Path):
    summary = write_report(finished)
    assert summary["compression"]["cut_int8"] == artifacts.read_json(finished.path("compression.json"))["cut_int8"]
    page = Path(finished.path("report", "report.html")).read_text()
    assert "<h2>With INT8</h2>" in page
    assert "cut + INT8" in page
    sha256 = summary["compression"]["sha256"]
    assert f"compression: sha256 {sha256} as reported" in list(check_run(finished))


def test_a_finished_quantisation_is_not_done_again(finished: Run, rows: str):
    again = Run(wanted(rows, Path(finished.dir)))
    stages.run_all(again)
    assert again._pool is None
    assert {again.manifest.stages[name].attempts for name in STAGES} == {1}


def test_the_accuracy_is_the_same_for_any_number_of_workers(finished: Run, rows: str, tmp_path: Path):
    shutil.copytree(finished.dir, tmp_path / "run")
    manifest = artifacts.read_json(str(tmp_path / "run" / "manifest.json"))
    for name in ("evaluate-int8", "compression"):
        del manifest[name]
    artifacts.write_json(str(tmp_path / "run" / "manifest.json"), manifest)
    shutil.rmtree(tmp_path / "run" / "units")
    again = Run(wanted(rows, tmp_path / "run", num_workers=2))
    quantise(again)
    again.release_pool()
    models = [artifacts.read_json(run.path("evaluation", "int8.json"))["models"] for run in (finished, again)]
    assert models[0] == models[1]


def test_another_file_than_the_evaluated_one_is_refused(finished: Run, rows: str, tmp_path: Path):
    shutil.copytree(finished.dir, tmp_path / "run")
    file = tmp_path / "run" / "model" / "model-int8.onnx"
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises(StaleArtifact, match=r"'evaluate-int8' was made from .*weights\.int8"):
        quantise(Run(wanted(rows, tmp_path / "run")))


def test_packages_that_are_missing_show_at_once(
    ray_cluster: None, rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pipeline.export.onnx.find_spec", lambda name: None)
    run = Run(wanted(rows, tmp_path))
    with pytest.raises(ValueError, match=r"gradient-pruning-pipeline\[export\]"):
        stages.check_early(run)
    assert run.manifest.stages == {}
