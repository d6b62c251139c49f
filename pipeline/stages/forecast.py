"""How long a run will take, said after its first units, kept in RUN/forecast.json, and made anew with each stage that ends."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline import artifacts
from pipeline.artifacts import StorageError
from pipeline.config import TrainingConfig
from pipeline.data.units import Units
from pipeline.report.forecast import (
    FORWARD,
    FORWARDS,
    GATES,
    GRADIENTS,
    HESSIAN,
    TEACHER,
    TRAINING,
    Forecast,
    Pace,
    Part,
    Work,
    foresee,
    lines,
    measured,
    with_pace,
)
from pipeline.run import Run, Watcher
from pipeline.saliency.curvature import CURVATURE_KINDS
from pipeline.stages.calibrating import calibration_units
from pipeline.stages.planning import channel_budget, kinds_needed, networks
from pipeline.stages.scoring import kinds_stored
from pipeline.stages.training import recovered, training_order, training_workers
from pipeline.training.calibrate import batch_norms
from pipeline.training.loop import Record

FILE = "forecast.json"


def watch(run: Run) -> None:
    """From here on the run says how long it will take."""
    watcher = Forecaster(run)
    for one in run.rounds:
        one.watcher = watcher


# --- what there is to do ----------------------------------------------------------------------------------------------


def works_of(run: Run) -> list[Work]:
    """Every stage of every round, in order."""
    return [work for one in run.rounds for work in _works_of_round(one, last=one is run)]


def _works_of_round(run: Run, last: bool) -> list[Work]:
    config, start = run.config, fraction(run.base, "ours") if run.base else 1.0
    plans = {name: fraction(run, name) for name in networks(run)}
    evaluated = Units(run.val_rows.row_groups, config.evaluate.batch_size, config.evaluate.num_rows).num_rows
    scored = Units(run.train_rows.row_groups, config.score.rows_per_unit, config.score.num_rows).num_rows
    kinds = kinds_stored(run)
    works = [
        Work("dense", _training(run, config.train, 1.0) if config.train.epochs else ()),
        Work("trace"),
    ]
    if config.sparsify.epochs:
        works.append(Work("sparsify", (*_training(run, config.sparsify, 1.0), *_estimation(run, [1.0]))))
    if kinds is not None:
        kind = GRADIENTS if "weights" in kinds else GATES
        works.append(Work("score", (_pass(run, kind, scored, start),)))
    if kinds_needed(run) & {*CURVATURE_KINDS}:
        works.append(Work("curvature", (_pass(run, HESSIAN, scored, start),)))
    works += [Work("plan"), Work("cut")]
    if config.masks.pattern is not None:
        works.append(Work("mask"))
    whole = 1.0 + (run.first.parent != "dense")
    works.append(Work("calibrate", _estimation(run, [*plans.values()])))
    works.append(Work("evaluate-before", (_pass(run, FORWARD, evaluated, whole + sum(plans.values())),)))
    if config.recover.epochs:
        for name in recovered(run):
            stage = "recover" if name == "ours" else f"recover-{name}"
            works.append(Work(stage, _training(run, config.recover, plans[name])))
        after = 1.0 + sum(plans[name] for name in recovered(run))
        works.append(Work("evaluate-after", (_pass(run, FORWARD, evaluated, after),)))
    if last:
        rows = config.evaluate.latency_runs * (1 + config.evaluate.latency_batch)
        timed = Part(FORWARD, rows, 1.0 + sum(plans.values()), workers=1)
        works += [Work("latency", (timed,)), Work("export")]
        works += [Work("onnx-latency")] if config.export.onnx else []
        works += [Work(f"export-{form}") for form in ("onnx", "program") if getattr(config.export, form)]
        if config.export.int8:
            three = _pass(run, FORWARD, evaluated, 1.0 + 2 * plans["ours"])
            works += [Work("export-int8"), Work("evaluate-int8", (three,)), Work("compression")]
    return [Work(run.label(work.stage), work.parts) for work in works]


def fraction(run: Run, name: str) -> float:
    """Of the dense network's multiply-accumulates in the network that a plan leaves; by the budget until there is a plan."""
    record = run.manifest.stages.get("plan")
    if record is not None and record.state == "done":
        plan = run.plan(name)
        return plan.kept.macs / plan.dense.macs
    budget = channel_budget(run.start_of(name))
    return budget.fraction if budget else 1.0


def _pass(run: Run, kind: str, rows: int, networks: float) -> Part:
    return Part(kind, rows, FORWARDS[kind] * networks, run.workers_now)


def _estimation(run: Run, fractions: Sequence[float]) -> tuple[Part, ...]:
    units = calibration_units(run)
    if units is None or not batch_norms(run.first.fresh()):
        return ()
    return (_pass(run, FORWARD, units.num_rows, sum(fractions)),)


def _training(run: Run, settings: TrainingConfig, network: float) -> tuple[Part, ...]:
    """The teacher is the dense network."""
    rows = training_order(run, settings).steps_per_epoch * settings.batch_size * settings.epochs
    forwards = FORWARDS[TRAINING] * network + (TEACHER if settings.distill_weight else 0.0)
    return (Part(TRAINING, rows, forwards, training_workers(run, settings)),)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass
class _Seen:
    """Of the stage that runs, in this process."""

    leases: int = 0
    rows: float = 0.0
    worker_seconds: float = 0.0
    records: int = 0
    rows_before: int = 0
    """Of a training, when its first record came; what was done by then also took the start of the workers."""
    seconds_before: float = 0.0


class Forecaster(Watcher):
    """Makes a forecast as soon as the first stage that reads rows shows its pace, and another when a stage ends.

    Args:
        run: the last round, which is the whole run.
    """

    def __init__(self, run: Run, clock: Callable[[], float] = time.time) -> None:
        self._run, self._clock = run, clock
        self._path = run.path(FILE)
        self._seen: dict[str, _Seen] = defaultdict(_Seen)
        stored = artifacts.read_json(self._path) if artifacts.exists(self._path) else None
        self._forecast = Forecast.from_dict(stored) if stored else None
        self._paces: dict[str, Pace] = dict(self._forecast.paces) if self._forecast else {}
        self._said = False
        forecast = self._make()
        if not forecast.all_read:
            self._say(forecast)

    def committed(self, run: Run, stage: str, rows: int, seconds: float) -> None:
        seen = self._seen[run.label(stage)]
        if seen.records:  # batch norms after a training
            return
        seen.leases, seen.rows, seen.worker_seconds = seen.leases + 1, seen.rows + rows, seen.worker_seconds + seconds
        # The first lease of each worker is one unit, slow since everything is new to it.
        if not self._said and seen.leases > run.workers_now // run.config.workers.shard_over:
            self._measure(run.label(stage), training=False)
            self._say(self._make())

    def trained(self, run: Run, stage: str, history: Sequence[Record]) -> None:
        seen, last = self._seen[run.label(stage)], history[-1]
        rows = sum(record["rows"] for record in history)
        if not seen.records:
            seen.rows_before, seen.seconds_before = rows, last["seconds"]
        seen.records = len(history)
        settings = {"dense": run.config.train, "sparsify": run.config.sparsify}.get(stage, run.config.recover)
        workers = training_workers(run, settings)
        since = (rows - seen.rows_before, last["seconds"] - seen.seconds_before)
        seen.rows, seconds = since if since[0] else (rows, last["seconds"])
        seen.worker_seconds = seconds * workers
        if not self._said and since[0]:
            self._measure(run.label(stage), training=True)
            self._say(self._make())

    def ended(self, run: Run, stage: str) -> None:
        label = run.label(stage)
        seen = self._seen.get(label)
        if seen:
            self._measure(label, training=seen.records > 0)
        forecast = self._make()
        if seen and forecast.total is not None and not forecast.all_read:
            self._say(forecast, all_lines=not self._said)

    def _measure(self, label: str, *, training: bool) -> None:
        seen = self._seen[label]
        work = next((one for one in works_of(self._run) if one.stage == label), Work(label))
        part = next((one for one in work.parts if (one.kind == TRAINING) == training), None)
        if part and seen.rows and seen.worker_seconds:
            self._paces = with_pace(self._paces, part.kind, measured(part, label, seen.rows, seen.worker_seconds))

    def _make(self) -> Forecast:
        run, works = self._run, works_of(self._run)
        records = [(one, one.label(name), record) for one in run.rounds for name, record in one.manifest.stages.items()]
        # What was taken over from another run took this one no time.
        took = {
            label: record.seconds if record.artifact.startswith(f"{one.dir.partition('?')[0]}/") else 0.0
            for one, label, record in records
            if record.state == "done"
        }
        rows = {work.stage: work.rows for work in works}
        shares = {label: min(1.0, seen.rows / rows[label]) for label, seen in self._seen.items() if rows.get(label)}
        self._forecast = foresee(
            works,
            self._paces,
            took,
            workers=run.workers_now,
            price_per_hour=run.config.workers.price_per_hour,
            now=self._clock(),
            shares_done=shares,
            before=self._forecast,
        )
        try:
            artifacts.write_json(self._path, self._forecast.as_dict())
        except StorageError as error:  # nothing is made from it: not worth the run
            run.say(f"forecast is not kept: {error}")
        return self._forecast

    def _say(self, forecast: Forecast, all_lines: bool = True) -> None:
        for line in lines(forecast)[: None if all_lines else 1]:
            self._run.say(line)
            self._said = True
