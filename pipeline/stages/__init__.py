"""The stages of a run, in the order of the data. Each finds its input in the run directory and leaves its output there."""

from __future__ import annotations

from pipeline import artifacts
from pipeline.artifacts import StaleArtifact
from pipeline.data.folder import require_same_classes
from pipeline.data.units import Units
from pipeline.execution.probe import probe_nodes
from pipeline.export import onnx
from pipeline.run import Run, environment
from pipeline.stages.calibrating import calibrate
from pipeline.stages.cutting import cut_and_verify
from pipeline.stages.forecast import watch
from pipeline.stages.masking import check_masks, mask_weights, require_maskable
from pipeline.stages.planning import check_blocks, check_stop, kinds_needed, plan
from pipeline.stages.quantising import quantise
from pipeline.stages.results import evaluate_after, evaluate_before, export, export_forms, latency, onnx_latency
from pipeline.stages.scoring import curvature, score, trace_groups
from pipeline.stages.training import (
    check_methods,
    check_shards,
    dense,
    recover,
    sparsify,
    sparsify_inputs,
    training_order,
)

SHARED = {
    "dense": ["networks/dense.safetensors", "networks/dense-statistics.safetensors"],
    "trace": ["graph.json"],
    "sparsify": ["networks/sparse.safetensors", "networks/sparse-statistics.safetensors"],
    "score": ["saliency/statistics.safetensors", "saliency/pass.json"],
    "curvature": ["saliency/curvature.safetensors"],
}
"""What runs with other budgets and criteria have in common, by stage; a file that a run had no need of is left out."""

OF_THE_PARENT = ("sparsify", "score", "curvature")
"""Of these, what runs have in common only if they cut the same weights: the dense ones, or those that `sparsify` leaves."""


def run_all(run: Run) -> None:
    """From a trained network to a smaller one, in as many rounds as the configuration says."""
    check_early(run)
    watch(run)
    for one in run.rounds:
        run_round(one)
        if one is not run:
            one.release()
    hand_over(run)


def run_round(run: Run) -> None:
    """Score, plan, cut and recover once."""
    dense(run)
    trace_groups(run)
    require_maskable(run.one_shot)
    sparsify(run)
    score(run)
    curvature(run)
    plan(run)
    cut_and_verify(run)
    mask_weights(run)
    calibrate(run)
    evaluate_before(run)
    recover(run)
    evaluate_after(run)


def hand_over(run: Run) -> None:
    """Measure the times of what is left, and write it down for other runtimes."""
    latency(run)
    export(run)
    onnx_latency(run)
    export_forms(run)
    quantise(run)


def branch(old: Run, new: Run) -> None:
    """Begin `new` with the dense network, the graph and the statistics of `old`, as far as they are done there; of several rounds the
    first."""
    old, new = old.first, new.first
    for stage, files in SHARED.items():
        record = old.manifest.stages.get(stage)
        if record is None or record.state != "done" or stage in new.manifest.stages:
            continue
        if stage in OF_THE_PARENT and not _cut_the_same(old, new):
            new.say(f"{stage}: not taken from {old.dir}, which cuts other weights")
            continue
        for file in files:
            if artifacts.exists(old.path(file)):
                artifacts.copy(old.path(file), new.path(file))
        new.manifest.adopt(stage, record)
        new.say(f"{stage}: taken from {old.dir}")


def _cut_the_same(old: Run, new: Run) -> bool:
    """Do both cut the dense network, or what the same sparse training makes of it?"""
    if old.parent != new.parent or new.parent == "dense":
        return old.parent == new.parent
    record = old.manifest.stages.get("sparsify")
    return record is not None and record.fingerprint == artifacts.sha256_of(sparsify_inputs(new))


def check_early(run: Run) -> None:
    """What would end the run after hours ends it now: names, paths, budgets, packages, the network's size against the labels'."""
    config, goal = run.given, run.one_shot
    artifacts.probe_writable(run.dir)
    require_rounds(run)
    check_methods(goal)
    check_shards(goal)
    kinds_needed(goal)
    check_masks(goal)
    check_stop(goal)
    check_blocks(goal)
    if config.export.onnx or config.export.int8:
        onnx.require_packages()
    _ = run.num_classes
    require_same_classes(run.train_rows, run.val_rows)
    Units(run.train_rows.row_groups, config.score.rows_per_unit, config.score.num_rows)
    Units(run.val_rows.row_groups, config.evaluate.batch_size, config.evaluate.num_rows)
    for training in (config.train, config.sparsify, config.recover):
        if training.epochs:
            training_order(run, training)
    probe_nodes(run.dir, [run.train_rows, run.val_rows], device=run.device, threads=config.workers.threads)
    if not artifacts.exists(run.path("config.yaml")):
        artifacts.write_json(run.path("environment.json"), environment(run))
        run.keep_config()


def require_rounds(run: Run) -> None:
    """The last round works in the directory itself: what one round has left there would be refused by it, hours later."""
    if run.base and "checkpoint_sha256" in getattr(run.manifest.stages.get("dense"), "inputs", {}):
        raise StaleArtifact(
            f"{run.dir} holds a run of one round, this one asks for rounds = {run.given.rounds}. Use another --run-dir, or begin a new run "
            f"with its statistics: python -m pipeline branch {run.dir} NEW --rounds {run.given.rounds}."
        )
