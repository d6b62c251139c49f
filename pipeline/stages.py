"""The stages of a run, in the order of the data. Each finds its input in the run directory and leaves its output there."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.config import TrainingConfig
from pipeline.data.batches import unit_batches
from pipeline.data.folder import require_same_classes
from pipeline.data.stream import Augmentation, TrainingOrder, training_loader
from pipeline.data.units import Units
from pipeline.execution.ledger import digest
from pipeline.execution.train import fit
from pipeline.export import artifact
from pipeline.models.graph import Graph
from pipeline.models.zoo import ModelError
from pipeline.pruning import allocation
from pipeline.pruning.masks import channel_masks, mask, save_masks
from pipeline.pruning.plan import Budget, Plan
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import trace
from pipeline.pruning.verify import verify
from pipeline.report.progress import progress
from pipeline.run import Run, environment
from pipeline.saliency import criteria
from pipeline.saliency.statistics import WEIGHT_KINDS, GateStatistics
from pipeline.training.calibrate import BatchNormStatistics, apply_statistics
from pipeline.training.evaluate import Evaluation, summarise
from pipeline.training.latency import measure_latency
from pipeline.training.settings import TrainSettings

VERIFY_ROWS = 16


def run_all(run: Run) -> None:
    """From a trained network to a smaller one and a report."""
    check_early(run)
    dense(run)
    trace_groups(run)
    score(run)
    plan(run)
    cut_and_verify(run)
    calibrate(run)
    evaluate_before(run)
    recover(run)
    evaluate_after(run)
    latency(run)
    export(run)


def networks(run: Run) -> list[str]:
    """The plans that are cut: ours and the controls."""
    return ["ours", *run.config.controls.criteria]


SHARED = {
    "dense": ["networks/dense.safetensors"],
    "trace": ["graph.json"],
    "score": ["saliency/statistics.safetensors", "saliency/pass.json"],
}
"""What runs with other budgets and criteria have in common, by stage."""


def branch(old: Run, new: Run) -> None:
    """Begin `new` with the dense network, the graph and the statistics of `old`, as far as they are done there."""
    for stage, files in SHARED.items():
        record = old.manifest.stages.get(stage)
        if record is None or record.state != "done" or stage in new.manifest.stages:
            return
        for file in files:
            artifacts.write_bytes(new.path(file), artifacts.read_bytes(old.path(file)))
        new.manifest.adopt(stage, record)
        new.say(f"{stage}: taken from {old.dir}")


def check_early(run: Run) -> None:
    """What would end the run after hours ends it now: names, paths, budgets, the network's size against the labels'."""
    config = run.config
    artifacts.probe_writable(run.dir)
    criteria.find(config.score.criterion)
    _ = run.num_classes
    require_same_classes(run.train_rows, run.val_rows)
    Units(run.train_rows.row_groups, config.score.rows_per_unit, config.score.num_rows)
    Units(run.val_rows.row_groups, config.evaluate.batch_size, config.evaluate.num_rows)
    for training in (config.train, config.recover):
        if training.epochs:
            training_order(run, training)
    if not artifacts.exists(run.path("config.yaml")):
        artifacts.write_json(run.path("environment.json"), environment(run))
        run.keep_config()


def model_inputs(run: Run) -> dict[str, Any]:
    return {
        "model": run.config.model.model_dump(mode="json"),
        "checkpoint_sha256": run.checkpoint_sha256,
        "seed": run.config.seed,
    }


# --- the dense network ----------------------------------------------------------------------------------------------------


def dense(run: Run) -> None:
    """RUN/networks/dense.safetensors: the given network, trained first where the configuration says so."""
    inputs = model_inputs(run)
    if run.config.train.epochs:
        inputs |= {"train": training_inputs(run, run.config.train)}

    def work() -> None:
        model = run.initial()
        state = model.state_dict()
        if run.config.train.epochs:
            state = run_training(run, "dense", run.config.train, model, teacher=None)
        run.save_network("dense", state)

    run.stage("dense", inputs, run.path("networks", "dense.safetensors"), work)


def weights_sha256(run: Run, name: str) -> str:
    return hashlib.sha256(artifacts.read_bytes(run.path("networks", f"{name}.safetensors"))).hexdigest()


def training_inputs(run: Run, training: TrainingConfig) -> dict[str, Any]:
    speed = {"checkpoint_every_steps", "loader_processes"}
    return {
        **training.model_dump(mode="json", exclude=speed),
        "rows": run.train_rows.fingerprint,
        "input": vars(run.input),
        "seed": run.config.seed,
    }


def training_order(run: Run, training: TrainingConfig) -> TrainingOrder:
    return TrainingOrder(run.train_rows.row_groups, training.num_streams, training.batch_size, seed=run.config.seed)


def run_training(
    run: Run, stage: str, training: TrainingConfig, model: nn.Module, teacher: nn.Module | None
) -> dict[str, Tensor]:
    """Train over the workers with Ray Train, in `stage`; goes on from that stage's newest checkpoint."""
    run.release_pool()
    config = run.config
    order = training_order(run, training)
    augmentation = Augmentation(
        size=run.input.size,
        mean=run.input.mean,
        std=run.input.std,
        scale=training.crop_scale,
        auto_augment=training.auto_augment,
        random_erase=training.random_erase,
    )
    settings = TrainSettings(
        epochs=training.epochs,
        seed=config.seed,
        log_every_steps=max(1, min(50, order.steps_per_epoch // 4)),
        **training.model_dump(include=SHARED_SETTINGS),
    )
    num_workers = min(run.num_workers, training.num_streams)
    make_batches = partial(
        worker_batches,
        run.train_rows,
        order,
        augmentation,
        run.num_classes,
        config.data.on_bad_row,
        int(config.data.max_bad_fraction * run.train_rows.num_rows),
        training.loader_processes,
    )
    total = order.steps_per_epoch * training.batch_size * training.epochs
    with progress("train" if stage == "dense" else stage, total=total, unit="rows", quiet=config.quiet) as bar:

        def show(history: Any) -> None:
            if history:
                bar.update(history[-1]["step"] * training.batch_size, loss=history[-1]["loss"])

        result = fit(
            model,
            teacher,
            make_batches,
            settings,
            steps_per_epoch=order.steps_per_epoch,
            fingerprint=artifacts.sha256_of({**training_inputs(run, training), "model": digest(model.state_dict())}),
            directory=run.scratch("checkpoints", stage),
            num_workers=num_workers,
            use_gpu=run.device == "cuda",
            threads=config.workers.threads,
            max_failures=config.workers.max_failures,
            on_progress=show,
        )
    return result.state_dict


SHARED_SETTINGS = {
    "batch_size",
    "lr",
    "min_lr",
    "warmup_epochs",
    "momentum",
    "weight_decay",
    "optimizer",
    "label_smoothing",
    "ema_decay",
    "distill_weight",
    "distill_temperature",
    "amp",
    "clip_grad_norm",
    "checkpoint_every_steps",
}


def worker_batches(
    source: Any,
    order: TrainingOrder,
    augmentation: Augmentation,
    num_classes: int,
    on_bad_row: str,
    max_bad_rows: int,
    processes: int,
    rank: int,
    size: int,
) -> Callable[[int, int], Any]:
    """What one training worker reads: its share of each step, from any step of any epoch on."""

    def batches(epoch: int, start_step: int) -> Any:
        return training_loader(
            source,
            order,
            augmentation,
            num_classes=num_classes,
            rank=rank,
            world_size=size,
            epoch=epoch,
            start_step=start_step,
            on_bad_row=on_bad_row,
            max_bad_rows=max_bad_rows,
            num_workers=processes,
        )

    return batches


# --- structure and saliency ------------------------------------------------------------------------------------------------


def trace_groups(run: Run) -> None:
    """RUN/graph.json: channel groups, tried by trial cuts."""

    def work() -> None:
        size = run.input.size
        graph = trace(run.network("dense"), torch.zeros(1, 3, size, size), seed=run.config.seed)
        artifacts.write_bytes(run.path("graph.json"), graph.to_json().encode())

    inputs = {"model": model_inputs(run)["model"], "image_size": run.input.size, "seed": run.config.seed}
    run.stage("trace", inputs, run.path("graph.json"), work)
    if "plan" not in run.manifest.stages:
        require_reachable(run)


def require_reachable(run: Run) -> None:
    """A budget below what the floors leave, or a network that cannot be cut at all, shows before hours of scoring."""
    graph = run.graph()
    if not graph.groups:
        reasons = "; ".join(f"{f.group}: {f.reason} ({f.operation} in {f.where})" for f in graph.frozen[:3])
        raise ModelError(
            f"'{run.config.model.name}' has no channels that can be removed. The first reasons: {reasons}."
        )
    saliency = {group.name: torch.ones(group.size, dtype=torch.float64) for group in graph.groups}
    for criterion in plan_criteria(run).values():
        planned(run, graph, saliency, criterion)


def score(run: Run) -> None:
    """RUN/saliency/statistics.safetensors: exact sums over the rows, from which every criterion is computed."""
    settings = run.config.score
    needs = criteria.find(settings.criterion).needs
    if not needs:
        run.say(f"score: left out, '{settings.criterion}' needs no rows")
        return
    graph = run.graph()
    units = Units(run.train_rows.row_groups, settings.rows_per_unit, settings.num_rows)
    with_weights = settings.statistics == "channels+weights" or bool({*needs} & {*WEIGHT_KINDS})
    inputs = run.pass_inputs(
        run.train_rows,
        units,
        settings.micro_batch,
        weights=weights_sha256(run, "dense"),
        graph=graph.sha256(),
        weight_statistics=with_weights,
    )

    def work() -> None:
        task = GateStatistics(run.network("dense"), graph, weights=with_weights)
        result = run.data_pass("score", task, run.train_rows, units, micro_batch=settings.micro_batch, title="score")
        values = {name: value.contiguous() for name, value in result.values.items()}
        artifacts.write_bytes(run.path("saliency", "statistics.safetensors"), save_safetensors(values))
        about = {key: value for key, value in asdict(result).items() if key != "values"}
        artifacts.write_json(run.path("saliency", "pass.json"), about)

    run.stage("score", inputs, run.path("saliency", "statistics.safetensors"), work)


def saliency_of(run: Run, criterion: str, graph: Graph) -> dict[str, Tensor]:
    """Saliency by a criterion, from what is stored: no pass over the data."""
    chosen = criteria.find(criterion)
    weights = {name: tensor.detach() for name, tensor in run.network("dense").state_dict().items()}
    statistics: dict[str, Tensor] = {}
    if chosen.needs:
        statistics = load_safetensors(artifacts.read_bytes(run.path("saliency", "statistics.safetensors")))
    return chosen.fn(graph, statistics, weights, run.config.score.seed)


def plan_criteria(run: Run) -> dict[str, str]:
    """Criterion of each plan that is made."""
    return {"ours": run.config.score.criterion, **{name: name for name in run.config.controls.criteria}}


def planned(run: Run, graph: Graph, saliency: dict[str, Tensor], criterion: str) -> Plan:
    settings = run.config.budget
    return allocation.plan(
        graph,
        saliency,
        Budget(params=settings.params, macs=settings.macs),
        criterion=criterion,
        scope=criteria.find(criterion).scope if settings.scope == "auto" else settings.scope,
        min_keep=settings.min_keep,
        round_to=settings.round_to,
    )


def plan(run: Run) -> None:
    """RUN/plan.json, RUN/plans/CONTROL.json, RUN/masks.safetensors, RUN/saliency/CRITERION.safetensors."""
    config, graph, named = run.config, run.graph(), plan_criteria(run)
    sums = (
        artifacts.read_json(run.path("saliency", "pass.json"))["sha256"] if criteria.find(named["ours"]).needs else None
    )
    inputs = {
        "graph": graph.sha256(),
        "weights": weights_sha256(run, "dense"),
        "saliency": sums,
        "criteria": named,
        "seed": config.score.seed,
        "budget": config.budget.model_dump(mode="json"),
    }

    def work() -> None:
        for name, criterion in named.items():
            saliency = saliency_of(run, criterion, graph)
            chosen = planned(run, graph, saliency, criterion)
            artifacts.write_bytes(run.plan_path(name), chosen.to_json().encode())
            content = {group: score.contiguous() for group, score in saliency.items()}
            artifacts.write_bytes(run.path("saliency", f"{name}.safetensors"), save_safetensors(content))
        save_masks(run.path("masks.safetensors"), channel_masks(run.plan("ours")))

    run.stage("plan", inputs, run.path("plan.json"), work)


# --- the smaller network -----------------------------------------------------------------------------------------------------


def cut_inputs(run: Run) -> dict[str, Any]:
    return {"weights": weights_sha256(run, "dense"), "plans": {name: run.plan(name).sha256() for name in networks(run)}}


def cut_and_verify(run: Run) -> None:
    """RUN/networks/NAME-cut.safetensors, RUN/verify.json: the cut network equals the masked dense one on real rows."""

    def work() -> None:
        network, images = run.network("dense"), example_images(run, VERIFY_ROWS)
        found = {}
        for name in networks(run):
            small = cut(network, run.plan(name))
            difference = verify(small, mask(network, run.plan(name)), images).require()
            found[name] = asdict(difference)
            run.save_network(f"{name}-cut", small.state_dict())
        artifacts.write_json(run.path("verify.json"), found)

    run.stage("cut", cut_inputs(run), run.path("verify.json"), work)


def example_images(run: Run, num_rows: int) -> Tensor:
    """The first validation rows that can be read, float32 [N, 3, size, size]."""
    units = Units(run.val_rows.row_groups, num_rows)
    for unit in units:
        policy = run.config.data.on_bad_row
        batches = unit_batches(
            run.val_rows, unit, run.input.decoder, micro_batch=num_rows, num_classes=run.num_classes, on_bad_row=policy
        )
        for batch in batches:
            if len(batch.labels_N):
                return batch.images_NCHW
    raise ValueError(f"{run.config.data.val} has no readable row.")


def calibrate(run: Run) -> None:
    """RUN/networks/NAME-calibrated.safetensors: batch-norm statistics of the cut networks, re-estimated on training rows."""
    settings = run.config.calibrate
    num_rows = min(
        settings.batches * settings.batch_size, run.train_rows.num_rows // settings.batch_size * settings.batch_size
    )
    plans = cut_inputs(run)
    if not num_rows:

        def keep() -> None:
            for name in networks(run):
                run.save_network(f"{name}-calibrated", run.network(f"{name}-cut", plan=name).state_dict())

        run.stage("calibrate", {**plans, "batches": 0}, run.path("networks"), keep)
        return
    units = Units(run.train_rows.row_groups, settings.batch_size, num_rows)
    inputs = run.pass_inputs(run.train_rows, units, settings.batch_size, **plans)

    def work() -> None:
        models = {name: run.network(f"{name}-cut", plan=name) for name in networks(run)}
        result = run.data_pass(
            "calibrate",
            BatchNormStatistics(models),
            run.train_rows,
            units,
            micro_batch=settings.batch_size,
            title="re-estimate batch norm",
        )
        for name, model in models.items():
            run.save_network(f"{name}-calibrated", apply_statistics(model, result.values, name).state_dict())

    run.stage("calibrate", inputs, run.path("networks"), work)


# --- accuracy ------------------------------------------------------------------------------------------------------------------


def evaluate_before(run: Run) -> None:
    """RUN/evaluation/before.json: the dense network and every cut one before any training."""
    plans = {name: (f"{name}-calibrated", name) for name in networks(run)}
    evaluate(run, "evaluate-before", "before", {"dense": ("dense", None), **plans})


def evaluate_after(run: Run) -> None:
    """RUN/evaluation/after.json: the recovered networks beside the dense one."""
    if run.config.recover.epochs:
        plans = {name: (f"{name}-recovered", name) for name in recovered(run)}
        evaluate(run, "evaluate-after", "after", {"dense": ("dense", None), **plans})


def evaluate(run: Run, stage: str, file: str, models: dict[str, tuple[str, str | None]]) -> None:
    settings = run.config.evaluate
    units = Units(run.val_rows.row_groups, settings.batch_size, settings.num_rows)
    inputs = run.pass_inputs(
        run.val_rows,
        units,
        settings.batch_size,
        weights={name: weights_sha256(run, weights) for name, (weights, _) in models.items()},
    )

    def work() -> None:
        loaded = {name: run.network(weights, plan=plan_name) for name, (weights, plan_name) in models.items()}
        task = Evaluation(loaded, run.num_classes, reference="dense")
        result = run.data_pass(
            stage,
            task,
            run.val_rows,
            units,
            micro_batch=settings.batch_size,
            title=f"evaluate {file} recovery",
        )
        metrics = {name: asdict(value) for name, value in summarise(result.values).items()}
        content = {"models": metrics, "rows": result.rows, "seconds": result.seconds, "bad_rows": result.bad_rows}
        artifacts.write_json(run.path("evaluation", f"{file}.json"), content)

    run.stage(stage, inputs, run.path("evaluation", f"{file}.json"), work)


# --- recovery --------------------------------------------------------------------------------------------------------------------


def recovered(run: Run) -> list[str]:
    return networks(run) if run.config.controls.recover else ["ours"]


def recover(run: Run) -> None:
    """RUN/networks/NAME-recovered.safetensors: trained after the cut, taught by the dense network."""
    settings = run.config.recover
    if not settings.epochs:
        run.say("recover: left out, recover.epochs is 0")
        return
    for name in recovered(run):
        inputs = {**training_inputs(run, settings), "weights": weights_sha256(run, f"{name}-calibrated")}

        stage = "recover" if name == "ours" else f"recover-{name}"

        def work(name: str = name, stage: str = stage) -> None:
            model = run.network(f"{name}-calibrated", plan=name)
            teacher = run.network("dense") if settings.distill_weight else None
            run.save_network(f"{name}-recovered", run_training(run, stage, settings, model, teacher))

        run.stage(stage, inputs, run.path("networks", f"{name}-recovered.safetensors"), work)


# --- the result --------------------------------------------------------------------------------------------------------------------


def final_weights(run: Run) -> str:
    return "ours-recovered" if run.config.recover.epochs else "ours-calibrated"


def latency(run: Run) -> None:
    """RUN/latency.json: forward times of the dense and the pruned network on a worker's device, measured in turns."""
    settings = run.config.evaluate
    inputs = {
        **cut_inputs(run),
        "device": run.device,
        "threads": run.config.workers.threads,
        "batches": [1, settings.latency_batch],
        "runs": settings.latency_runs,
        "image_size": run.input.size,
    }

    def work() -> None:
        models = {"dense": run.network("dense")}
        models |= {name: run.network(f"{name}-cut", plan=name) for name in networks(run)}
        found = run.pool.call(
            _measure, models, run.input.size, (1, settings.latency_batch), run.device, settings.latency_runs
        )
        artifacts.write_json(run.path("latency.json"), found)

    run.stage("latency", inputs, run.path("latency.json"), work)


def _measure(
    models: dict[str, nn.Module], size: int, batches: tuple[int, int], device: str, runs: int
) -> dict[str, Any]:
    return measure_latency(models, (3, size, size), batch_sizes=batches, device=torch.device(device), runs=runs)


def export(run: Run) -> None:
    """RUN/model: the artifact."""
    weights = final_weights(run)
    plan_ = run.plan("ours")
    accuracy = artifacts.read_json(run.path("evaluation", "after.json" if run.config.recover.epochs else "before.json"))
    top1 = accuracy["models"]["ours"]["top1"]

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
            extra={"top1": top1, **({"classes_of_the_dense_network": list(model.classes)} if model.classes else {})},
            input_size=(3, run.input.size, run.input.size),
            normalisation=normalisation(run),
        )

    inputs = {"weights": weights_sha256(run, weights), "plan": plan_.sha256()}
    run.stage("export", inputs, run.path("model"), work)


def normalisation(run: Run) -> dict[str, Any]:
    """How an image became a tensor in this run, in timm's words."""
    input_ = run.input
    return {
        "mean": list(input_.mean),
        "std": list(input_.std),
        "interpolation": input_.interpolation,
        "crop_pct": input_.crop_fraction,
    }
