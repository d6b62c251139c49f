"""Stages that measure and hand over: accuracy, latency, the artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from pipeline import artifacts
from pipeline.data.units import Units
from pipeline.export import artifact, onnx
from pipeline.models.sharding import Network
from pipeline.run import Run
from pipeline.stages.planning import cut_inputs, networks
from pipeline.stages.training import recovered
from pipeline.training.evaluate import Evaluation, summarise
from pipeline.training.latency import measure_latency


def evaluate_before(run: Run) -> None:
    """RUN/evaluation/before.json: the dense network, what it was cut from, and every pruned one before any training."""
    whole = dict.fromkeys(("dense", run.first.parent))
    models: dict[str, tuple[str, str | None]] = {name: (name, None) for name in whole}
    models |= {name: (f"{name}-calibrated", name) for name in networks(run)}
    evaluate(run, "evaluate-before", "before", models)


def evaluate_after(run: Run) -> None:
    """RUN/evaluation/after.json: the recovered networks beside the dense one."""
    if run.config.recover.epochs:
        plans = {name: (f"{name}-recovered", name) for name in recovered(run)}
        evaluate(run, "evaluate-after", "after", {"dense": ("dense", None), **plans})


def evaluate(run: Run, stage: str, file: str, models: dict[str, tuple[str, str | None]]) -> None:
    def home(plan: str | None) -> Run:
        return run.first if plan is None else run

    def load() -> dict[str, Network]:
        return {name: home(plan).sent(weights, plan) for name, (weights, plan) in models.items()}

    made_from = {name: home(plan).weights_sha256(weights) for name, (weights, plan) in models.items()}
    evaluate_networks(run, stage, file, load, reference="dense", weights=made_from)


def evaluate_networks(
    run: Run,
    stage: str,
    file: str,
    load: Callable[[], Mapping[str, Network]],
    *,
    reference: str,
    weights: dict[str, Any],
) -> None:
    """RUN/evaluation/FILE.json: all networks on the validation rows, in one pass.

    Args:
        load: the networks by name, asked for only where there is something to do.
        reference: the one whose answers the others' are compared with.
        weights: what tells the networks apart from others under the same names.
    """
    settings = run.config.evaluate
    units = Units(run.val_rows.row_groups, run.rows_per_unit(settings.batch_size), settings.num_rows)
    inputs = run.pass_inputs(run.val_rows, units, settings.batch_size, weights=weights)

    def work() -> None:
        result = run.data_pass(
            stage,
            Evaluation(load(), run.num_classes, reference=reference),
            run.val_rows,
            units,
            micro_batch=settings.batch_size,
            title=stage.replace("-", " "),
        )
        metrics = {name: asdict(value) for name, value in summarise(result.values).items()}
        content = {"models": metrics, "rows": result.rows, "seconds": result.seconds, "bad_rows": result.bad_rows}
        artifacts.write_json(run.path("evaluation", f"{file}.json"), content)

    run.stage(stage, inputs, run.path("evaluation", f"{file}.json"), work)


def latency(run: Run) -> None:
    """RUN/latency.json: forward times of the dense and the pruned network on a worker's device, measured in turns."""
    settings = run.config.evaluate
    inputs = {**_timing_inputs(run), "device": run.device}

    def work() -> None:
        models = {"dense": run.first.network("dense")}
        models |= {name: run.network(f"{name}-cut", plan=name) for name in networks(run)}
        found = run.pool.call(
            _measure, models, run.input.size, (1, settings.latency_batch), run.device, settings.latency_runs
        )
        artifacts.write_json(run.path("latency.json"), found)

    run.stage("latency", inputs, run.path("latency.json"), work)


def onnx_latency(run: Run) -> None:
    """RUN/onnx_latency.json: ONNX Runtime's times of the dense and the pruned network on a worker's CPU; if ONNX is asked for."""
    if not run.config.export.onnx:
        return
    settings = run.config.evaluate

    def work() -> None:
        models = {"dense": run.first.network("dense"), "ours": run.network("ours-cut", plan="ours")}
        found = run.pool.call(_measure_onnx, models, run.input.size, (1, settings.latency_batch), settings.latency_runs)
        artifacts.write_json(run.path("onnx_latency.json"), found)

    run.stage("onnx-latency", _timing_inputs(run), run.path("onnx_latency.json"), work)


def _timing_inputs(run: Run) -> dict[str, Any]:
    settings = run.config.evaluate
    return {
        **cut_inputs(run),
        "threads": run.config.workers.threads,
        "batches": [1, settings.latency_batch],
        "runs": settings.latency_runs,
        "image_size": run.input.size,
    }


def _measure(
    models: dict[str, nn.Module], size: int, batches: tuple[int, int], device: str, runs: int
) -> dict[str, Any]:
    return measure_latency(models, (3, size, size), batch_sizes=batches, device=torch.device(device), runs=runs)


def _measure_onnx(models: dict[str, nn.Module], size: int, batches: tuple[int, int], runs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        files = {name: f"{directory}/{name}.onnx" for name in models}
        for name, model in models.items():
            onnx.to_onnx(model, torch.zeros(1, 3, size, size), files[name])
        return onnx.onnx_latency(files, (3, size, size), batch_sizes=batches, runs=runs)


def export(run: Run) -> None:
    """RUN/model: the artifact."""
    weights = run.result
    plan_ = run.plan("ours")
    accuracy = artifacts.read_json(run.path("evaluation", "after.json" if run.config.recover.epochs else "before.json"))
    extra: dict[str, Any] = {"top1": accuracy["models"]["ours"]["top1"]}
    if run.config.model.classes:
        extra["classes_of_the_dense_network"] = list(run.config.model.classes)
    if run.config.masks.pattern is not None:
        masks = artifacts.read_json(run.path("weight_masks.json"))["ours"]
        extra["weight_masks"] = {key: masks[key] for key in ("pattern", "criterion", "kept", "weights", "nonzero")}

    def work() -> None:
        model = run.config.model
        kwargs: dict[str, Any] = dict(model.kwargs)
        if model.num_classes or model.classes:
            kwargs["num_classes"] = run.num_classes
        artifact.save(
            run.network(weights, plan="ours"),
            plan_,
            run.path("model"),
            factory=model.name,
            factory_kwargs=kwargs,
            extra=extra,
            input_size=(3, run.input.size, run.input.size),
            normalisation=normalisation(run),
        )

    inputs = {"weights": run.weights_sha256(weights), "plan": plan_.sha256()}
    run.stage("export", inputs, run.path("model"), work)


FORMS = {"onnx": ("model.onnx", onnx.to_onnx), "program": ("model.pt2", onnx.to_program)}
"""By field of the configuration's section `export`: the file in RUN/model, and what writes it."""


def export_forms(run: Run) -> None:
    """RUN/model/model.onnx, RUN/model/model.pt2: those that are asked for, each compared with the network."""
    weights = run.result
    inputs = {
        "weights": run.weights_sha256(weights),
        "plan": run.plan("ours").sha256(),
        "image_size": run.input.size,
    }
    for form, (file, write) in FORMS.items():
        if not getattr(run.config.export, form):
            continue

        def work(file: str = file, write: Callable[..., onnx.Exported] = write) -> None:
            example = torch.zeros(1, 3, run.input.size, run.input.size)
            found = write(run.network(weights, plan="ours"), example, run.path("model", file))
            rows = "any number of rows" if found.open_batch else "one row at a time"
            run.say(f"{file} takes {rows}; its outputs differ by at most {found.difference.max_rel:.2g} (relative)")

        run.stage(f"export-{form}", inputs, run.path("model", file), work)


def normalisation(run: Run) -> dict[str, Any]:
    """How an image became a tensor in this run, in timm's words."""
    input_ = run.input
    return {
        "mean": list(input_.mean),
        "std": list(input_.std),
        "interpolation": input_.interpolation,
        "crop_pct": input_.crop_fraction,
    }
