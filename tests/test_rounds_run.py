"""Rounds of score, plan, cut and recover: one run from the network that was given to the budget, whatever interrupts it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline import artifacts, cli, stages
from pipeline.artifacts import StaleArtifact
from pipeline.checks import check_run
from pipeline.config import (
    BudgetConfig,
    ConfigError,
    ControlsConfig,
    MasksConfig,
    ModelConfig,
    RunConfig,
    ScoreConfig,
    SparsifyConfig,
    TrainingConfig,
    parse,
)
from pipeline.export.artifact import load
from pipeline.models.costs import count
from pipeline.models.standalone import Removed
from pipeline.pruning.surgery import cut
from pipeline.run import Run
from pipeline.stages.planning import channel_budget
from pipeline.summary import write_report
from tests.test_run import config, write_rows

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

RESNET = ModelConfig(name="tests.residual:resnet", pretrained=False)
RECOVER = TrainingConfig(epochs=1, batch_size=40, num_streams=2, lr=0.01, warmup_epochs=0, distill_weight=0.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


def in_rounds(rows: str, run_dir: Path, **changes: object) -> RunConfig:
    return config(rows, run_dir, **{"model": RESNET, "rounds": 2, "recover": RECOVER, **changes})


@pytest.fixture(scope="module")
def finished(ray_cluster: None, rows: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(in_rounds(rows, tmp_path_factory.mktemp("one")))
    stages.run_all(run)
    run.release()
    return run


def final_hashes(run: Run) -> list[tuple[str, str]]:
    return [(one.plan("ours").sha256(), one.weights_sha256(one.result)) for one in run.rounds]


@pytest.mark.slow
def test_the_last_round_meets_the_budget_of_the_network_that_was_given(finished: Run):
    first, last = (one.plan("ours") for one in finished.rounds)
    assert first.dense == last.dense == count(finished.first.graph(), {})
    assert first.budget == {"macs": 0.707106781187}  # the root of a half
    assert last.budget == {"macs": 0.5}
    assert 0.69 < first.kept.macs / first.dense.macs <= 0.7072
    assert 0.48 < last.kept.macs / last.dense.macs <= 0.5


@pytest.mark.slow
def test_what_is_left_lies_where_it_always_does(finished: Run):
    model, network = load(finished.path("model")), finished.network(finished.result, plan="ours")
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(model(images), network(images))
    assert sum(p.numel() for p in model.parameters()) == finished.plan("ours").kept.params
    costs = artifacts.read_json(finished.path("model", "architecture.json"))["costs"]
    assert costs["dense"]["params"] == sum(p.numel() for p in finished.first.initial().parameters())
    assert sorted(artifacts.list_dir(finished.path("rounds"))) == ["1"]
    assert not Path(finished.first.path("config.yaml")).exists()  # a round is no run to go on with


@pytest.mark.slow
def test_each_round_starts_from_the_result_of_the_one_before(finished: Run):
    first, last = finished.rounds
    result = artifacts.read_tensors(first.path("networks", "ours-recovered.safetensors"))
    start = artifacts.read_tensors(last.path("networks", "dense.safetensors"))
    assert result.keys() == start.keys()
    assert all(torch.equal(result[name], start[name]) for name in start)
    assert [one.config.seed for one in finished.rounds] == [0, 1]


@pytest.mark.slow
def test_controls_are_cut_from_the_dense_network_at_once(finished: Run):
    dense = {name: tuple(tensor.shape) for name, tensor in finished.first.initial().state_dict().items()}
    for name in ("random", "magnitude"):
        plan = finished.plan(name)
        assert plan.graph_sha256 == finished.first.graph().sha256()
        assert all(dense[tensor] == tuple(shape) for tensor, shape in plan.shapes.items())
        assert 0.48 < plan.kept.macs / finished.plan("ours").dense.macs <= 0.5
        small = cut(finished.first.network("dense"), plan).state_dict()
        stored = artifacts.read_tensors(finished.path("networks", f"{name}-cut.safetensors"))
        assert all(torch.equal(stored[key], small[key]) for key in small)
    assert not artifacts.exists(finished.first.plan_path("random"))


@pytest.mark.slow
def test_the_report_tells_the_rounds_and_compares_with_the_dense_network(finished: Run):
    summary = write_report(finished)
    assert [found["round"] for found in summary["rounds"]] == [1, 2]
    assert summary["rounds"][1]["macs"] == summary["pruned"]["macs"] < summary["rounds"][0]["macs"]
    assert summary["rounds"][1]["top1"] == summary["pruned"]["top1"]
    assert all(found["seconds"] > 0 and found["top1_before_recovery"] is not None for found in summary["rounds"])
    before = artifacts.read_json(finished.first.path("evaluation", "before.json"))["models"]["dense"]
    assert summary["dense"]["top1"] == before["top1"]
    assert summary["dense"]["params"] == finished.first.plan("ours").dense.params
    sizes = {group.name: group.size for group in finished.first.graph().groups}
    assert {group["name"]: group["size"] for group in summary["plan"]["groups"]} == sizes
    assert {"round 1: score", "round 2: export"} <= {stage["name"] for stage in summary["stages"]}
    page = Path(finished.path("report", "report.html")).read_text()
    assert "Round by round" in page
    assert "the controls are cut from the dense network in one" in page
    lines = [line for line in check_run(finished) if line.startswith("cut ours")]
    assert [line.split(":")[0] for line in lines] == ["cut ours, round 1", "cut ours, round 2"]


@pytest.mark.slow
def test_the_teacher_and_the_network_compared_with_are_those_of_the_first_round(
    finished: Run, monkeypatch: pytest.MonkeyPatch
):
    found: list[object] = []
    monkeypatch.setattr("pipeline.stages.training.run_training", lambda *arguments, **_: found.append(arguments[4]))
    monkeypatch.setattr(Run, "stage", lambda run, name, inputs, artifact, work: work())
    monkeypatch.setattr(Run, "save_network", lambda *_: None)
    with pytest.raises(AttributeError):  # what was trained has no weights here
        stages.recover(finished)
    assert found == [finished.first.network("dense")]
    monkeypatch.setattr("pipeline.stages.results.Evaluation", lambda models, *_, **__: found.append(models["dense"]))
    monkeypatch.setattr(Run, "data_pass", lambda *_, **__: None)
    with pytest.raises(AttributeError):
        stages.evaluate_after(finished)
    assert found[1] is finished.first.network("dense")


@pytest.mark.slow
def test_a_finished_run_does_nothing_again(finished: Run, rows: str, monkeypatch: pytest.MonkeyPatch):
    expected = final_hashes(finished)
    monkeypatch.setattr("pipeline.artifacts.Manifest.begin", lambda *_: pytest.fail("a stage begins again"))
    again = Run(in_rounds(rows, Path(finished.dir)))
    stages.run_all(again)
    assert [one._pool for one in again.rounds] == [None, None]
    assert final_hashes(again) == expected


class Dies(Exception):
    pass


def run_until(run: Run, name: str, number: int) -> None:
    """All stages, up to death at the beginning of stage `name` in round `number`."""
    stage = getattr(stages, name)

    def instead(one: Run) -> None:
        if one.number == number:
            raise Dies
        stage(one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, name, instead)
        stages.run_all(run)


@pytest.mark.slow
def test_interrupted_between_and_inside_rounds_it_ends_with_the_same_hashes(
    finished: Run, rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name, number in (("recover", 1), ("dense", 2), ("score", 2), ("calibrate", 2)):
        with pytest.raises(Dies):
            run_until(Run(in_rounds(rows, tmp_path)), name, number)
    summary = write_report(Run(in_rounds(rows, tmp_path)))
    assert [found["top1"] is None for found in summary["rounds"]] == [False, True]
    cli._status(type("Options", (), {"run": str(tmp_path)}))
    shown = capsys.readouterr().out
    assert "round 1: recover" in shown
    assert "round 2: cut" in shown
    again = Run(cli._stored(str(tmp_path)))
    stages.run_all(again)
    again.release()
    assert final_hashes(again) == final_hashes(finished)
    assert {record.attempts for record in again.stages.values()} == {1}


@pytest.mark.slow
def test_a_run_in_rounds_begins_with_the_statistics_of_a_run_of_one(finished: Run, rows: str, tmp_path: Path):
    one = Run(in_rounds(rows, tmp_path / "one", rounds=1, budget=BudgetConfig(macs=0.6)))
    stages.branch(finished, one)
    three = Run(in_rounds(rows, tmp_path / "three", rounds=3))
    stages.branch(one, three)
    assert {*three.first.manifest.stages} == {"dense", "trace", "score"}
    for stage in (stages.check_early, lambda run: [each(run.first) for each in (stages.score, stages.plan)]):
        stage(three)
    assert three.first._pool is None
    assert three.first.plan("ours").budget == {"macs": round(0.5 ** (1 / 3), 12)}


def test_rounds_in_the_directory_of_a_run_of_one_are_refused_at_once(ray_cluster: None, rows: str, tmp_path: Path):
    one = Run(in_rounds(rows, tmp_path, rounds=1))
    stages.check_early(one)
    stages.dense(one)
    with pytest.raises(StaleArtifact, match=r"holds a run of one round.*rounds = 2.*branch"):
        stages.check_early(Run(in_rounds(rows, tmp_path)))
    stages.check_early(Run(in_rounds(rows, tmp_path, rounds=1)))


@pytest.mark.slow
def test_one_budget_spreads_its_channels_over_the_rounds_and_masks_in_the_last(
    ray_cluster: None, rows: str, tmp_path: Path
):
    masks = MasksConfig(pattern="unstructured", scope="global")
    run = Run(in_rounds(rows, tmp_path, budget=BudgetConfig(params=0.25), masks=masks))
    stages.run_all(run)
    run.release()
    summary, first = write_report(run), run.first.plan("ours")
    assert [one.plan("ours").budget["params"] for one in run.rounds] == [0.707106781187, 0.5]
    assert summary["pruned"]["nonzero_params"] == first.dense.params // 4
    assert summary["controls"]["magnitude"]["nonzero_params"] == first.dense.params // 4
    assert not artifacts.exists(run.first.path("weight_masks.json"))
    assert any("of its weights are masked, and zero" in line for line in check_run(run))


@pytest.mark.slow
def test_blocks_go_in_any_round_and_never_more_than_allowed(ray_cluster: None, rows: str, tmp_path: Path):
    budget = BudgetConfig(params=0.2, min_keep=0.5, max_blocks=0.7)
    run = Run(in_rounds(rows, tmp_path, budget=budget, recover=TrainingConfig()))
    stages.run_all(run)
    run.release()
    removed = [block.name for one in run.rounds for block in one.plan("ours").blocks]
    summary, last = write_report(run), run.plan("ours")
    assert 1 <= len(removed) <= 2
    assert (summary["plan"]["removed_blocks"], summary["plan"]["num_blocks"]) == (removed, 3)
    assert 0.18 * last.dense.params < last.kept.params <= 0.2 * last.dense.params
    model = load(run.path("model"))
    assert sorted(name for name, module in model.named_modules() if isinstance(module, Removed)) == sorted(removed)


@pytest.mark.slow
def test_training_towards_zeros_comes_before_the_first_round_and_aims_at_the_whole_budget(
    ray_cluster: None, rows: str, tmp_path: Path
):
    sparsify = SparsifyConfig(**RECOVER.model_dump(exclude={"distill_weight"}), method=("l1_sign",))
    run = Run(in_rounds(rows, tmp_path, sparsify=sparsify, recover=TrainingConfig()))
    stages.run_all(run)
    run.release()
    assert run.first.manifest.stages["sparsify"].inputs["budget"]["macs"] == 0.5
    assert "sparsify" not in run.manifest.stages
    summary = write_report(run)
    assert summary["sparse"]["top1"] is not None
    assert summary["dense"]["top1"] is not None


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_budgets_are_powers_of_the_whole_one(tmp_path: Path, rows: str):
    def budgets(**changes: object) -> list[dict[str, float]]:
        run = Run(config(rows, tmp_path, rounds=3, **changes))
        return [channel_budget(one).as_dict() for one in run.rounds]

    assert budgets(budget=BudgetConfig(params=0.125)) == [{"params": 0.5}, {"params": 0.25}, {"params": 0.125}]
    shared = {"budget": BudgetConfig(params=0.125**2), "masks": MasksConfig(pattern="unstructured")}
    assert budgets(**shared) == [{"params": 0.5}, {"params": 0.25}, {"params": 0.125}]
    one = Run(config(rows, tmp_path, rounds=3, budget=BudgetConfig(params=0.125))).one_shot
    assert channel_budget(one).as_dict() == {"params": 0.125}
    assert one.dir.endswith("rounds/1")


def test_what_a_round_does_of_the_whole(tmp_path: Path, rows: str):
    training = TrainingConfig(epochs=1)
    score = ScoreConfig(statistics=("weights",))
    whole = config(
        rows, tmp_path, rounds=3, train=training, recover=training, masks=MasksConfig(pattern="2:4"), score=score
    )
    first, second, last = (whole.of_round(number) for number in (1, 2, 3))
    assert [one.train.epochs for one in (first, second, last)] == [1, 0, 0]
    assert [one.recover.epochs for one in (first, second, last)] == [1, 1, 1]
    assert [one.masks.pattern for one in (first, second, last)] == [None, None, "2:4"]
    assert [len(one.controls.criteria) for one in (first, second, last)] == [0, 0, 2]
    assert [one.score.statistics for one in (first, second, last)] == [("weights",), (), ()]
    assert whole.model_copy(update={"rounds": 1}).of_round(1).train == training


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rounds": 0}, "rounds = 0"),
        ({"rounds": 2, "budget": {}, "masks": {"pattern": "2:4"}}, r"rounds \(2\) share the cutting out"),
    ],
)
def test_rounds_of_nothing_are_refused(changes: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        parse({"budget": {"macs": 0.5}, **changes})


def test_what_training_counted_says_nothing_of_later_rounds(ray_cluster: None, rows: str, tmp_path: Path):
    score = ScoreConfig(criterion="movement", rows_per_unit=8, micro_batch=8)
    run = Run(in_rounds(rows, tmp_path, train=RECOVER, score=score, controls=ControlsConfig(criteria=())))
    with pytest.raises(ValueError, match=r"rounds \(2\): movement is counted while the dense network is trained"):
        stages.check_early(run)
