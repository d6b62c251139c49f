"""`python -m pipeline status`: what a run directory alone tells, in every state that a run can be in."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline import artifacts, cli
from pipeline.artifacts import Manifest
from pipeline.config import RunConfig
from pipeline.execution.ledger import Commit, Ledger
from pipeline.report import status as statuses
from pipeline.report.forecast import Forecast, Pace, Part, Work, foresee
from pipeline.report.progress import alive
from pipeline.report.status import Looker, Place, sentences, watch

NOW = 100_000.0
UNITS = {"units": {"num_units": 40, "rows_per_unit": 8, "num_rows": 320}}


def begin(directory: str, stage: str, inputs: dict[str, object], ago: float) -> str:
    """A stage that was begun so long ago. Returns the name of its directories."""
    manifest = Manifest(directory)
    manifest.begin(stage, inputs)
    return _dated(directory, stage, started=NOW - ago)


def finish(directory: str, stage: str, ago: float, took: float) -> None:
    begin(directory, stage, {}, ago)
    Manifest(directory).finish(stage, artifacts.join(directory, stage))
    _dated(directory, stage, started=NOW - ago, finished=NOW - ago + took)


def _dated(directory: str, stage: str, **times: float) -> str:
    path = artifacts.join(directory, "manifest.json")
    stored = artifacts.read_json(path)
    stored[stage] |= times
    artifacts.write_json(path, stored)
    return f"{stage}-{artifacts.short(stored[stage]['fingerprint'])}"


def commit(directory: str, key: str, units: list[int], ago: float, fingerprint: str | None = None, bad: int = 0) -> str:
    """As a worker leaves it; the sums are of no interest here."""
    folder = artifacts.join(directory, "units", key)
    Path(folder).mkdir(parents=True, exist_ok=True)
    whole = (
        fingerprint or artifacts.read_json(artifacts.join(directory, "manifest.json"))[key.split("-")[0]]["fingerprint"]
    )
    rows = tuple({"file": "f", "row_group": 0, "row": row, "cause": "x"} for row in range(bad))
    sums = {"loss": torch.zeros(3, dtype=torch.int64)}
    name = Ledger(folder, 40, whole).write(Commit(units, 8 * len(units) - bad, sums, rows))
    _touch(os.path.join(folder, name), ago)
    return os.path.join(folder, name)


def _touch(path: str, ago: float) -> None:
    os.utime(path, (NOW - ago, NOW - ago))


def train(directory: str, key: str, steps: int, ago: float, **last: float) -> None:
    """As training leaves its history: a record of 400 rows every 10 steps, one every 4 s."""
    history = [
        {"step": 10 * i, "epoch": 0, "loss": 2.0 / i, "lr": 0.1, "rows": 400, "seconds": 4.0 * i, "rows_per_s": 100.0}
        for i in range(1, steps // 10 + 1)
    ]
    history[-1] |= last
    path = artifacts.join(directory, "checkpoints", key, "metrics.jsonl")
    artifacts.write_bytes(path, "".join(json.dumps(record) + "\n" for record in history).encode())
    _touch(path, ago)


def a_forecast(directory: str, took: dict[str, float] | None = None) -> None:
    works = [
        Work("score", (Part("gates", 320, 2.0, 2),)),
        Work("plan"),
        Work("recover", (Part("training", 4000, 3.0, 2),)),
    ]
    options = {"workers": 2, "price_per_hour": None, "now": NOW, "shares_done": {}, "before": None}
    found: Forecast = foresee(works, {"gates": Pace(0.5, "score")}, took or {}, **options)
    artifacts.write_json(artifacts.join(directory, "forecast.json"), found.as_dict())


def look(directory: str | Path) -> statuses.Status:
    return Looker([Place(str(directory), str)], clock=lambda: NOW).look()


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path)


def test_a_run_that_has_not_begun_says_so(run_dir: str):
    assert sentences(look(run_dir)) == ["No stage has begun."]


def test_scoring_tells_its_units_its_speed_and_what_is_left(run_dir: str):
    finish(run_dir, "trace", ago=200.0, took=20.0)
    key = begin(run_dir, "score", UNITS, ago=100.0)
    commit(run_dir, key, [0, 1, 2, 3], ago=60.0)
    commit(run_dir, key, [4, 5, 6, 7, 8, 9], ago=20.0, bad=2)
    trace, score = look(run_dir).stages
    assert (trace.state, trace.seconds, trace.attempts, trace.seconds_left) == ("done", 20.0, 1, None)
    assert (score.state, score.seconds, score.attempts) == ("running", 100.0, 1)
    # ten units in the 80 s until the last commit
    assert score.how_far == "10 of 40 units (25 %) in 2 commits, 0.97 rows/s, 2 rows skipped"
    assert score.seconds_left == 30 / (10 / 80)
    assert score.sign_age_s == 20.0
    assert sentences(look(run_dir))[0].endswith("2 rows skipped; last sign of life 20.0 s ago.")


def test_a_unit_counts_once_and_what_is_torn_or_foreign_does_not(run_dir: str):
    key = begin(run_dir, "score", UNITS, ago=100.0)
    commit(run_dir, key, [0, 1], ago=50.0)
    commit(run_dir, key, [1, 2], ago=40.0)
    commit(run_dir, key, [5, 6], ago=30.0, fingerprint="another")
    torn = commit(run_dir, key, [3, 4], ago=30.0)
    Path(torn).write_bytes(Path(torn).read_bytes()[:-8])
    assert look(run_dir).stages[0].how_far.startswith("2 of 40 units (5 %) in 1 commits")


def test_units_of_an_earlier_start_count_but_tell_nothing_of_the_speed_of_this_one(run_dir: str):
    key = begin(run_dir, "score", UNITS, ago=5000.0)
    commit(run_dir, key, [*range(20)], ago=4000.0)
    begin(run_dir, "score", UNITS, ago=50.0)
    (stage,) = look(run_dir).stages
    assert (stage.attempts, stage.seconds_left, stage.sign_age_s) == (2, None, 50.0)
    commit(run_dir, key, [20, 21], ago=10.0)
    assert look(run_dir).stages[0].seconds_left == 18 / (2 / 40)


def test_the_sums_of_commits_are_never_read_and_their_headers_once(run_dir: str, monkeypatch: pytest.MonkeyPatch):
    key = begin(run_dir, "score", UNITS, ago=100.0)
    commit(run_dir, key, [0], ago=10.0)
    opened: list[str] = []

    def counted(path: str, name: str, size: int, real: Callable[..., object] = statuses.StoredCommit.open) -> object:
        opened.append(name)
        return real(path, name, size)

    monkeypatch.setattr(statuses.StoredCommit, "open", counted)
    looker = Looker([Place(run_dir, str)], clock=lambda: NOW)
    looker.look()
    commit(run_dir, key, [1], ago=5.0)
    assert looker.look().stages[0].how_far.startswith("2 of 40")
    assert len(opened) == len(set(opened)) == 2


def test_training_tells_its_step_and_by_its_last_records_how_long_it_takes(run_dir: str):
    a_forecast(run_dir)
    key = begin(run_dir, "recover", {"batch_size": 40}, ago=30.0)
    (recover, score, plan) = look(run_dir).stages
    assert (recover.how_far, recover.seconds_left) == ("", 3000 - 30)  # as foreseen
    assert (score.state, score.seconds_left, plan.seconds_left) == ("to come", 160.0, None)
    train(run_dir, key, steps=20, ago=3.0, zeros=0.25)
    recover = look(run_dir).stages[0]
    assert recover.how_far == "step 20 of 100, loss 1, 25.0 % zero, 100 rows/s"
    assert (recover.seconds_left, recover.sign_age_s) == (32.0, 3.0)  # 3,200 rows at 400 in 4 s
    train(run_dir, key, steps=10, ago=3.0)
    assert look(run_dir).stages[0].seconds_left == 36.0


def test_batch_norms_after_a_training_are_told_as_units(run_dir: str):
    key = begin(run_dir, "sparsify", {"batch_size": 40, "calibrate": {"num_units": 40}}, ago=30.0)
    train(run_dir, key, steps=20, ago=9.0)
    commit(run_dir, key, [0, 1], ago=2.0)
    assert look(run_dir).stages[0].how_far.startswith("2 of 40 units (5 %)")


def test_a_stage_without_a_sign_of_life_is_told_as_such(run_dir: str):
    key = begin(run_dir, "score", UNITS, ago=2000.0)
    commit(run_dir, key, [0], ago=14 * 60)
    (stage,) = look(run_dir).stages
    assert stage.state == "silent"
    assert sentences(look(run_dir))[0].endswith("no sign of life for 14 min 00 s; the same command resumes.")


def test_a_driver_that_lives_is_a_sign_of_life_also_where_a_stage_leaves_no_files(run_dir: str):
    begin(run_dir, "trace", {}, ago=2000.0)
    assert look(run_dir).stages[0].state == "silent"
    artifacts.write_json(f"{run_dir}/alive.json", {"time": NOW - 12, "host": "head", "pid": 7})
    assert sentences(look(run_dir))[0] == "trace: last sign of life 12.0 s ago (head, process 7)."
    begin(run_dir, "plan", {}, ago=5.0)
    assert look(run_dir).stages[1].driver == ""  # a sign of an earlier stage says nothing about who is at this one


def test_the_sign_of_life_is_written_while_a_stage_works(tmp_path: Path):
    path = tmp_path / "run" / "alive.json"
    with alive(str(path), every_s=0.001, clock=lambda: 5.0):
        while not path.exists():
            pass
    assert artifacts.read_json(str(path)) == {"time": 5.0, "host": os.uname().nodename, "pid": os.getpid()}
    with alive(str(tmp_path / "none.json"), every_s=60.0):
        pass
    assert not (tmp_path / "none.json").exists()


def test_a_finished_run_has_nothing_left(run_dir: str):
    a_forecast(run_dir, took={"score": 10.0, "plan": 1.0})
    for stage in ("score", "plan", "recover"):
        finish(run_dir, stage, ago=100.0, took=10.0)
    assert look(run_dir).finished
    assert sentences(look(run_dir)) == ["Everything is done."]


def test_a_run_that_died_between_two_stages_is_told_as_such(run_dir: str):
    a_forecast(run_dir, took={"score": 10.0})
    finish(run_dir, "score", ago=100.0, took=10.0)
    assert sentences(look(run_dir)) == ["At least about 50 min 00 s left."]
    finish(run_dir, "score", ago=1000.0, took=10.0)
    assert sentences(look(run_dir))[0] == "No stage has begun for 16 min 30 s; the same command resumes."


def test_what_is_left_is_the_running_stage_and_those_to_come(run_dir: str):
    a_forecast(run_dir)
    key = begin(run_dir, "score", UNITS, ago=100.0)
    commit(run_dir, key, [*range(20)], ago=0.0)
    status = look(run_dir)
    assert [one.stage for one in status.stages] == ["score", "plan", "recover"]
    assert status.seconds_left == 100 + 3000
    assert sentences(status)[-1] == "At least about 51 min 40 s left."  # of the plan nothing is known


def test_rounds_are_looked_at_where_they_are(tmp_path: Path):
    first, last = str(tmp_path / "rounds" / "1"), str(tmp_path)
    finish(first, "score", ago=100.0, took=5.0)
    key = begin(last, "score", UNITS, ago=50.0)
    commit(last, key, [0], ago=10.0)
    places = [Place(first, "round 1: {}".format), Place(last, "round 2: {}".format)]
    stages = Looker(places, clock=lambda: NOW).look().stages
    assert [(one.stage, one.state) for one in stages] == [("round 1: score", "done"), ("round 2: score", "running")]


def test_a_run_on_an_object_store_is_looked_at_in_the_same_way(tmp_path: Path):
    key = begin(str(tmp_path), "score", UNITS, ago=100.0)
    commit(str(tmp_path), key, [0, 1], ago=20.0)
    assert look(tmp_path.as_uri()).stages == look(tmp_path).stages
    assert statuses.modified(artifacts.join(tmp_path.as_uri(), "nothing")) == {}


def test_watching_ends_with_the_run(run_dir: str):
    begin(run_dir, "export", {}, ago=5.0)
    shown, slept = [], []

    def sleep(seconds: float) -> None:
        assert not slept
        slept.append(seconds)
        finish(run_dir, "export", ago=5.0, took=4.0)

    watch(lambda: look(run_dir), lambda status: shown.append(status.stages[0].state), 3.0, sleep)
    assert (shown, slept) == (["running", "done"], [3.0])


def test_the_command_needs_no_cluster(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    values = {"run_dir": str(tmp_path), "budget": {"macs": 0.5}, "rounds": 2}
    artifacts.write_bytes(str(tmp_path / "config.yaml"), RunConfig(**values).to_yaml().encode())
    cli.main(["status", str(tmp_path)])
    assert capsys.readouterr().out == "No stage has begun.\n"
    finish(str(tmp_path / "rounds" / "1"), "score", ago=100.0, took=5.0)
    finish(str(tmp_path), "export", ago=10.0, took=5.0)
    cli.main(["status", str(tmp_path), "--watch", "0.5"])
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["round", "1:", "score", "done"] in [line[:4] for line in shown]
    assert shown[-1] == ["Everything", "is", "done."]
    with pytest.raises(SystemExit):
        cli.main(["status", str(tmp_path / "nothing")])
    assert "is no run directory" in capsys.readouterr().err
