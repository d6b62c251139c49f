"""The forecast of a run: worked out by hand, from its rows, its budget and what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import artifacts, stages
from pipeline.config import CalibrateConfig, ControlsConfig, RunConfig, ScoreConfig, TrainingConfig, WorkersConfig
from pipeline.execution.drive import LocalPool
from pipeline.report import forecast
from pipeline.report.forecast import FORWARD, GATES, TRAINING, Forecast, Pace, Part, Work, foresee, seconds_of
from pipeline.report.status import Looker, Place
from pipeline.run import Run
from pipeline.stages.forecast import Forecaster, works_of
from pipeline.summary import _forecast, write_report
from tests.test_run import config, write_rows

SCORE = Work("score", (Part(GATES, 1000, 2.0, 4),))
TRAIN = Work("recover", (Part(TRAINING, 6000, 2.5, 2),))
EVALUATE = Work("evaluate-after", (Part(FORWARD, 500, 1.5, 4),))
WORKS = [SCORE, Work("plan"), TRAIN, EVALUATE]


def foreseen(paces=None, took=None, before=None, now=100.0, price=None, shares=None, works=WORKS) -> Forecast:
    options = {"workers": 4, "price_per_hour": price, "now": now, "shares_done": shares or {}, "before": before}
    return foresee(works, paces or {}, took or {}, **options)


def test_seconds_are_rows_times_forwards_times_pace_over_workers():
    paces = {GATES: Pace(0.01, "score")}
    assert seconds_of(SCORE, paces) == 1000 * 2 * 0.01 / 4
    assert seconds_of(TRAIN, paces) == 6000 * 2.5 * 0.01 / 2  # not measured: as if a forward took as long as in scoring
    both = forecast.with_pace(paces, TRAINING, Pace(0.02, "recover"))
    assert seconds_of(TRAIN, both) == 6000 * 2.5 * 0.02 / 2
    assert seconds_of(EVALUATE, both) == 500 * 1.5 * 0.02 / 4  # as in the stage that was measured last
    assert seconds_of(Work("plan"), both) is None
    assert seconds_of(SCORE, {}) is None


def test_a_measured_pace_gives_back_the_time_it_was_measured_in():
    part = SCORE.parts[0]
    pace = forecast.measured(part, "score", rows=250, worker_seconds=20.0)
    assert pace == Pace(0.04, "score")
    assert seconds_of(SCORE, {GATES: pace}) == 20.0  # four workers do four times as many rows


def test_the_whole_run_counts_what_is_done_as_it_was_and_costs_all_workers():
    found = foreseen({GATES: Pace(0.36, "score")}, took={"score": 200.0, "plan": 40.0}, price=3.0)
    assert [one.seconds for one in found.stages] == [200.0, 40.0, 2700.0, 67.5]
    assert found.total is not None
    assert found.total.seconds == 3007.5
    assert found.total.worker_hours == 4 * 3007.5 / 3600
    assert found.total.cost == 3 * 4 * 3007.5 / 3600


def test_without_any_measurement_nothing_is_said():
    found = foreseen()
    assert [one.seconds for one in found.stages] == [None] * 4
    assert (found.total, forecast.lines(found)) == (None, [])


def test_what_was_foreseen_first_stays_and_a_stage_that_is_done_gets_no_forecast():
    first = foreseen({GATES: Pace(0.01, "score")}, shares={"score": 0.25})
    again = Forecast.from_dict(json.loads(json.dumps(first.as_dict(), sort_keys=True)))
    assert again == first
    later = foreseen({GATES: Pace(0.03, "score")}, took={"score": 9.0, "plan": 1.0}, before=again, now=200.0)
    by_stage = {one.stage: one for one in later.stages}
    assert by_stage["score"].first == forecast.First(5.0, 100.0, 0.25, 1000, 4)
    assert by_stage["recover"].first == forecast.First(75.0, 100.0, 0.0, 6000, 2)
    assert by_stage["recover"].seconds == 225.0
    assert by_stage["plan"].first is None
    assert (later.first, first.total) == (first.total, later.first)
    late = foreseen({GATES: Pace(0.03, "score")}, took={"score": 9.0}, now=200.0)
    assert late.stages[0].first is None


def test_other_work_or_other_workers_are_foreseen_anew():
    first = foreseen({GATES: Pace(0.01, "score")})
    more = [SCORE, Work("plan"), Work("recover", (Part(TRAINING, 6000, 2.5, 8),)), EVALUATE]
    later = foreseen({GATES: Pace(0.01, "score")}, before=first, now=200.0, works=more)
    assert later.stages[2].first == forecast.First(18.75, 200.0, 0.0, 6000, 8)
    assert later.stages[0].first == first.stages[0].first


def test_stages_without_rows_take_as_long_as_in_the_round_before():
    works = [Work("round 1: score", SCORE.parts), Work("round 1: plan"), Work("round 2: plan"), Work("round 2: cut")]
    found = foreseen({GATES: Pace(0.01, "s")}, took={"round 1: score": 5.0, "round 1: plan": 7.0}, works=works)
    assert [one.seconds for one in found.stages] == [5.0, 7.0, 7.0, None]


def test_the_lines_say_how_long_how_many_worker_hours_and_from_what():
    found = foreseen({GATES: Pace(0.36, "score")}, took={"score": 172.5}, price=3)
    assert forecast.lines(found) == [
        "forecast: 49 min 00 s in all with 4 workers, 3.27 worker-hours, costs 9.80",
        "  recover 45 min 00 s, evaluate-after 1 min 08 s",
        "  not foreseen, since they read no rows: plan",
        "  measured: gates in score; others by multiply-accumulates (forwards of a row: forward 1, gradients 3, curvature 15, training 3)",
    ]


# --- what a run has to do ---------------------------------------------------------------------------------------------


RECOVER = TrainingConfig(epochs=2, batch_size=40, num_streams=2, warmup_epochs=0, distill_weight=0.5)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet")


def a_run(rows: str, run_dir: Path, **changes: object) -> Run:
    """Without a cluster: it would have four workers."""
    values = {"recover": RECOVER, "quiet": False, **changes}
    run = Run(config(rows, run_dir, **values))
    for one in run.rounds:
        one.__dict__["num_workers"] = 4
    return run


def test_the_work_of_a_run_by_hand(rows: str, tmp_path: Path):
    run = a_run(rows, tmp_path, controls=ControlsConfig(criteria=("random",)))
    assert {work.stage: work.parts for work in works_of(run)} == {
        "dense": (),
        "trace": (),
        "score": (Part(GATES, 200, 2.0, 4),),
        "plan": (),
        "cut": (),
        "calibrate": (Part(FORWARD, 64, 1.0, 4),),  # two networks of half the MACs
        "evaluate-before": (Part(FORWARD, 200, 2.0, 4),),
        "recover": (Part(TRAINING, 400, 2.5, 2),),  # 2 epochs of 5 steps, half a network and a whole teacher; 2 streams
        "evaluate-after": (Part(FORWARD, 200, 1.5, 4),),
        "latency": (Part(FORWARD, 9, 2.0, 1),),  # 3 runs of 1 and of 2 rows
        "export": (),
    }


def test_what_a_stage_reads_and_trains_follows_the_configuration(rows: str, tmp_path: Path):
    changes = {
        "train": TrainingConfig(epochs=1, batch_size=40, num_streams=8, warmup_epochs=0),
        "score": ScoreConfig(rows_per_unit=8, micro_batch=8, num_rows=64, statistics=("weights", "curvature")),
        "calibrate": CalibrateConfig(batches=0),
        "recover": TrainingConfig(epochs=0),
        "controls": ControlsConfig(criteria=()),
    }
    work = {one.stage: one.parts for one in works_of(a_run(rows, tmp_path, **changes))}
    assert work["dense"] == (Part(TRAINING, 200, 3.0, 4),)
    assert work["score"] == (Part("gradients", 64, 3.0, 4),)
    assert work["curvature"] == (Part("curvature", 64, 15.0, 4),)
    assert work["calibrate"] == ()
    assert not {"recover", "evaluate-after"} & {*work}


def test_each_round_starts_from_what_the_one_before_is_to_leave(rows: str, tmp_path: Path):
    run = a_run(rows, tmp_path, rounds=2, controls=ControlsConfig(criteria=("magnitude",)))
    work = {one.stage: one.parts for one in works_of(run)}
    root = 0.5**0.5
    for stage, forwards in (
        ("score", (2, 2 * root)),
        ("recover", (3 * root + 1, 2.5)),
        ("evaluate-before", (1 + root, 2)),
    ):
        assert [work[f"round {n}: {stage}"][0].forwards for n in (1, 2)] == pytest.approx(forwards)
    assert "round 1: latency" not in work


# --- while it runs ----------------------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def finish(run: Run, stage: str, started: float, seconds: float) -> None:
    """As the manifest has it of a stage that was done by one start."""
    run.manifest.begin(stage, {})
    run.manifest.finish(stage, run.path(stage))
    record = run.manifest.stages[stage]
    object.__setattr__(record, "started", started)
    object.__setattr__(record, "finished", started + seconds)


def history(*steps: tuple[int, float]) -> list[dict[str, float]]:
    return [{"step": step, "rows": 40, "seconds": seconds} for step, seconds in steps]


def test_a_forecast_comes_after_the_first_units_and_is_refined_when_a_stage_ends(
    rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run, clock = a_run(rows, tmp_path, workers=WorkersConfig(price_per_hour=9.0)), Clock()
    watcher = Forecaster(run, clock)
    assert artifacts.read_json(run.path("forecast.json"))["total"] is None
    for _ in range(4):
        watcher.committed(run, "score", 8, 1.6)
    assert capsys.readouterr().err == ""  # each worker's first unit
    watcher.committed(run, "score", 8, 1.6)
    said = capsys.readouterr().err.splitlines()
    # 8 s of a worker for 40 rows of 2 forwards: 0.1 s; 200 rows by 4 workers 10 s, 400 rows of 2.5 forwards by 2 workers 50 s
    assert "score 10.0 s, calibrate 2.4 s, evaluate-before 12.5 s, recover 50.0 s, evaluate-after 7.5 s" in said[1]
    stored = Forecast.from_dict(artifacts.read_json(run.path("forecast.json")))
    assert stored.stages[2].first == forecast.First(10.0, 1000.0, 0.2, 200, 4)

    clock.now = 1012.0
    finish(run, "score", 1000.0, 12.0)
    watcher.ended(run, "score")
    watcher.trained(run, "recover", history((1, 9.0)))
    watcher.trained(run, "recover", history((1, 9.0), (2, 11.0)))
    clock.now = 1050.0
    finish(run, "recover", 1020.0, 30.0)
    watcher.ended(run, "recover")
    stored = Forecast.from_dict(artifacts.read_json(run.path("forecast.json")))
    # 40 rows of 2.5 forwards took 2 workers 2 s; what the first record took is the start of the workers, too
    assert stored.paces == {GATES: Pace(0.1, "score"), TRAINING: Pace(0.04, "recover")}
    by_stage = {one.stage: one for one in stored.stages}
    assert by_stage["evaluate-after"].seconds == 200 * 1.5 * 0.04 / 4
    assert (by_stage["recover"].seconds, by_stage["recover"].first.seconds) == (30.0, 50.0)
    assert len(capsys.readouterr().err.splitlines()) == 2  # a line for each stage


def test_a_run_that_goes_on_says_at_once_what_is_left(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = a_run(rows, tmp_path)
    watcher = Forecaster(run, Clock())
    for _ in range(5):
        watcher.committed(run, "score", 8, 1.6)
    first = capsys.readouterr().err
    again = a_run(rows, tmp_path)
    Forecaster(again, Clock())
    assert capsys.readouterr().err == first


def test_the_report_sets_facts_beside_what_was_foreseen_before_them(rows: str, tmp_path: Path):
    run, clock = a_run(rows, tmp_path), Clock()
    watcher = Forecaster(run, clock)
    for _ in range(5):
        watcher.committed(run, "score", 8, 1.6)
    finish(run, "score", 995.0, 12.0)
    finish(run, "calibrate", 1010.0, 3.0)
    finish(run, "evaluate-before", 900.0, 50.0)  # as one that was over before anything was foreseen
    run.manifest.begin("recover", {})
    run.manifest.begin("recover", {})
    run.manifest.finish("recover", run.path("x"))
    found = _forecast(run)
    by_name = {one["name"]: (one["forecast_seconds"], one["seconds"], one["share_done"]) for one in found["stages"]}
    assert by_name["score"] == (10.0, 12.0, 0.2)
    assert by_name["calibrate"] == (pytest.approx(2.4), pytest.approx(3.0), 0.0)
    assert by_name["recover"] == (50.0, None, 0.0)  # in two starts: nobody knows how long
    assert "evaluate-before" not in by_name
    assert by_name["evaluate-after"][1] is None
    assert found["worker_hours"] == pytest.approx(4 * found["seconds"] / 3600)
    assert "used_seconds" not in found


class Here(LocalPool):
    """A worker in this process, as the stages ask for one."""

    def call(self, function: Callable[..., object], *args: object) -> object:
        return function(*args)


@pytest.mark.slow
def test_a_whole_run_is_foreseen_from_its_first_units_and_reported_against_the_facts(
    rows: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("pipeline.training.latency.WARMUP_S", 0.0)
    monkeypatch.setattr(stages, "probe_nodes", lambda *args, **options: None)
    workers = WorkersConfig(num_workers=1, commit_interval_s=0.2, price_per_hour=6.0)
    run = Run(config(rows, tmp_path, recover=TrainingConfig(epochs=0), quiet=False, workers=workers))
    run.__dict__ |= {"device": "cpu", "num_workers": 1, "_pool": Here()}
    stages.run_all(run)
    lines = [line for line in capsys.readouterr().err.splitlines() if "forecast" in line]
    assert len(lines) == 4  # while scoring, and after each pass: the latency reads rows, too
    found = write_report(run)["forecast"]
    names = [stage["name"] for stage in found["stages"]]
    assert names == ["score", "calibrate", "evaluate-before", "latency"]
    assert 0 < found["stages"][0]["share_done"] < 1
    assert all(stage["seconds"] is not None for stage in found["stages"])
    assert found["used_worker_hours"] == pytest.approx(sum(one.seconds for one in run.stages.values()) / 3600)
    assert found["used_cost"] == pytest.approx(6 * found["used_worker_hours"])
    assert "Forecast and fact" in (tmp_path / "report" / "report.html").read_text()
    status = Looker([Place(run.dir, run.label)]).look()
    assert status.finished
    assert {one.stage for one in status.stages} == {work.stage for work in works_of(run)}


def test_a_price_is_no_part_of_what_a_run_is_made_from(rows: str, tmp_path: Path):
    priced = RunConfig(**{**config(rows, tmp_path).model_dump(), "workers": {"price_per_hour": 1.5}})
    assert priced.workers.price_per_hour == 1.5
    with pytest.raises(ValueError, match="price_per_hour"):
        WorkersConfig(price_per_hour=-1)
