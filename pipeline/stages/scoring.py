"""Stages that score: channel groups, and the exact statistics from which every criterion is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.data.units import STRIDES, Units
from pipeline.execution.drive import PassResult
from pipeline.models.zoo import ModelError
from pipeline.pruning.stability import plan_change
from pipeline.pruning.trials import trace
from pipeline.run import Run
from pipeline.saliency.curvature import CURVATURE_KINDS, CurvatureStatistics
from pipeline.saliency.statistics import TRAINING_KINDS, GateStatistics, at_stride, by_group
from pipeline.stages.planning import (
    STORED,
    budget_inputs,
    kinds_needed,
    our_plan,
    plan_rules,
    planned,
    statistics,
)

FEWEST_UNITS = 8
"""Of half a sample: with fewer, that a plan does not change says nothing."""


def trace_groups(run: Run) -> None:
    """RUN/graph.json: channel groups, tried by trial cuts; residual blocks where they may go, or where a graph that is there has them."""
    record = run.manifest.stages.get("trace")
    blocks = run.config.budget.max_blocks > 0 or bool(record and record.inputs.get("blocks"))

    def work() -> None:
        size = run.input.size
        graph = trace(run.network("dense"), torch.zeros(1, 3, size, size), seed=run.config.seed, blocks=blocks)
        artifacts.write_bytes(run.path("graph.json"), graph.to_json().encode())

    inputs = {"model": run.model_inputs()["model"], "image_size": run.input.size, "seed": run.config.seed}
    inputs |= {"blocks": True} if blocks else {}
    run.stage("trace", inputs, run.path("graph.json"), work)
    if "plan" not in run.manifest.stages:
        require_reachable(run if run.base else run.one_shot)


def require_reachable(run: Run) -> None:
    """A budget below what the floors leave, or a network that cannot be cut at all, shows before hours of scoring."""
    graph = run.graph()
    if not run.config.budget.given:
        return
    if not graph.groups and not graph.blocks:
        reasons = "; ".join(f"{f.group}: {f.reason} ({f.operation} in {f.where})" for f in graph.frozen[:3])
        raise ModelError(
            f"'{run.config.model.name}' has no channels that can be removed. The first reasons: {reasons}."
        )
    saliency = {name: torch.ones(size, dtype=torch.float64) for name, size in graph.scored().items()}
    for rule in plan_rules(run).values():
        planned(run, graph, saliency, rule)


# --- statistics ------------------------------------------------------------------------------------------------------------


def score(run: Run) -> None:
    """RUN/saliency/statistics.safetensors: exact sums over the rows, from which every criterion is computed."""
    settings, graph = run.config.score, run.graph()
    units = Units(run.train_rows.row_groups, settings.rows_per_unit, settings.num_rows)
    kinds = kinds_stored(run)
    if kinds is None:
        run.say("score: left out, no criterion needs rows")
        return
    inputs = run.pass_inputs(
        run.train_rows,
        units,
        settings.micro_batch,
        weights=run.weights_sha256(run.parent),
        graph=graph.sha256(),
        kinds=kinds,
        sample=_sample(run),
    )

    def work() -> None:
        options = {"weights": "weights" in kinds, "inputs": "inputs" in kinds}
        task = GateStatistics(run.sent(run.parent), graph, **options)
        results: list[PassResult] = []
        into = run.path("saliency", "statistics.safetensors")
        for stride in _strides(settings.stop_when_stable, len(units)):
            result = run.data_pass(
                "score",
                task,
                run.train_rows,
                units,
                micro_batch=settings.micro_batch,
                title="score",
                stride=stride,
                into=into,
            )
            values = by_group(graph, artifacts.read_tensors(into))
            results.append(result)
            if stride == 1 or _is_stable(run, values, stride):
                break
        artifacts.write_json(run.path("saliency", "pass.json"), _about(results))

    run.stage("score", inputs, run.path("saliency", "statistics.safetensors"), work)


def _about(results: list[PassResult]) -> dict[str, Any]:
    """The last of growing samples has all the rows; time and losses are those of all."""
    about = {key: value for key, value in vars(results[-1]).items() if key != "values"}
    return about | {
        "seconds": sum(result.seconds for result in results),
        "lost_workers": sum(result.lost_workers for result in results),
        "resumed_units": min(results[0].resumed_units, results[-1].units),
    }


def kinds_stored(run: Run) -> list[str] | None:
    """What the pass stores beside the channel gates; None if it is not needed. What it has stored already may be more."""
    needed = kinds_needed(run)
    if not needed - {*TRAINING_KINDS}:
        return None
    kinds = {name for name in ("weights", "inputs") if needed & {*STORED[name]}}
    if needed & {*CURVATURE_KINDS}:
        kinds.add("weights")  # the second pass multiplies the Hessian with the gradient of the first
    record = run.manifest.stages.get("score")
    stored = {*record.inputs.get("kinds", [])} if record else set()
    return sorted(stored if kinds <= stored else kinds)


def _sample(run: Run) -> dict[str, Any] | None:
    """What decides where the pass ends, if not at the last row. A sample that is there already serves other plans, too."""
    if run.config.score.stop_when_stable is None:
        return None
    rule = plan_rules(run)["ours"]
    wanted = {
        "stop_when_stable": run.config.score.stop_when_stable,
        "criterion": rule.name,
        "seed": run.config.score.seed,
        "budget": budget_inputs(run),
    }
    record = run.manifest.stages.get("score")
    stored = record.inputs.get("sample") if record and record.state == "done" else None
    if stored and stored != wanted and stored["stop_when_stable"] == wanted["stop_when_stable"]:
        run.say(f"score: the sample of rows was judged by {stored['criterion']} and budget {stored['budget']}")
        return dict(stored)
    return wanted


def _strides(stop_when_stable: float | None, num_units: int) -> list[int]:
    """Samples of the data in the order in which they are scored: every unit, or growing samples to look at in between."""
    if stop_when_stable is None:
        return [1]
    return [*(s for s in reversed(STRIDES[:-1]) if num_units // (2 * s) >= FEWEST_UNITS), 1]


def _is_stable(run: Run, values: dict[str, Tensor], stride: int) -> bool:
    """Does the plan of these rows differ from that of half of them by no more than `stop_when_stable`?

    For estimates whose variance falls as 1/n the difference between n/2 and n rows has variance v/n, that between n and any larger
    number N has v/n - v/N: in expectation no more rows can change the plan by more than the last doubling did.
    """
    limit = run.config.score.stop_when_stable
    assert limit is not None
    change = plan_change(our_plan(run, at_stride(values, 2 * stride)), our_plan(run, values))
    rows = int(values["rows"])
    run.say(f"score: from {rows // 2} to {rows} rows the plan exchanges {change:.1%} of what it removes")
    return change <= limit


def curvature(run: Run) -> None:
    """RUN/saliency/curvature.safetensors: second-order statistics, by a second pass with the gradient of the first."""
    if not kinds_needed(run) & {*CURVATURE_KINDS}:
        return
    settings, graph = run.config.score, run.graph()
    units = Units(run.train_rows.row_groups, settings.rows_per_unit, settings.num_rows)
    first = artifacts.read_json(run.path("saliency", "pass.json"))
    inputs = run.pass_inputs(
        run.train_rows, units, settings.micro_batch, weights=run.weights_sha256(run.parent), gradient=first["sha256"]
    )

    def work() -> None:
        task = CurvatureStatistics(run.network(run.parent), graph, statistics(run))
        run.data_pass(
            "curvature",
            task,
            run.train_rows,
            units,
            micro_batch=settings.micro_batch,
            title="score, second order",
            into=run.path("saliency", "curvature.safetensors"),
        )

    run.stage("curvature", inputs, run.path("saliency", "curvature.safetensors"), work)
