"""Stages that train: the dense network before pruning, and the cut ones after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from pipeline import artifacts
from pipeline.artifacts import StorageError
from pipeline.config import TrainingConfig
from pipeline.data.stream import Augmentation, TrainingOrder, training_loader
from pipeline.execution.ledger import digest
from pipeline.execution.train import fit
from pipeline.models.sharding import Network, Stored
from pipeline.pruning import allocation
from pipeline.report.events import EventFile
from pipeline.report.progress import progress
from pipeline.run import Run
from pipeline.saliency.curvature import CURVATURE_KINDS
from pipeline.stages.calibrating import calibration_inputs, reestimated
from pipeline.stages.masking import weight_target
from pipeline.stages.planning import budget_inputs, channel_budget, kinds_needed, networks, one_budget
from pipeline.training.dynamic import Masked
from pipeline.training.loop import Record, TrainResult
from pipeline.training.penalties import PlanOf
from pipeline.training.policies import Aim, policies, require_aims
from pipeline.training.policy import MakePolicy, Movement
from pipeline.training.settings import TrainSettings


def dense(run: Run) -> None:
    """RUN/networks/dense.safetensors: the given network, trained first where the configuration says so."""
    training, inputs = run.config.train, run.model_inputs()
    stored = run.manifest.stages["dense"].inputs.get("train", {}) if "dense" in run.manifest.stages else {}
    movement = (
        "movement" in kinds_needed(run) or "movement" in stored
    )  # what was summed once is no reason to train anew
    if training.epochs:
        inputs |= {"train": training_inputs(run, training) | ({"movement": True} if movement else {})}

    def work() -> None:
        model = run.initial()
        if not training.epochs:
            run.save_network("dense", model.state_dict())
            return
        policies = [Movement] if movement else []
        network: Network = model
        if run.config.workers.shard_over > 1:
            run.save_network("initial", model.state_dict())
            network = run.stored("initial")
            del model
        _keep(run, "dense", run_training(run, "dense", training, network, teacher=None, policies=policies))

    run.stage("dense", inputs, run.path("networks", "dense.safetensors"), work)


def sparsify(run: Run) -> None:
    """RUN/networks/sparse.safetensors: trained on with penalties, gates or changing masks, where the configuration says so."""
    settings, goal = run.config.sparsify, run.one_shot
    if not settings.epochs:
        return

    def work() -> None:
        dense = run.network("dense")
        teacher = dense if settings.distill_weight else None
        result = run_training(run, "sparsify", settings, dense, teacher, policies=sparse_policies(goal))
        if unmet := unmet_aim(result.history[-1]):
            run.say(f"sparsify: {unmet}")
        sparse = copy.deepcopy(dense)
        sparse.load_state_dict(result.state_dict)
        # The last updates, and gates and masks that settle, change what norms see; averaged statistics lag behind.
        sparse = reestimated(run, "sparsify", {"sparse": sparse})["sparse"]
        _keep(run, "sparse", replace(result, state_dict=sparse.state_dict()))

    run.stage("sparsify", sparsify_inputs(run), run.path("networks", "sparse.safetensors"), work)


def sparsify_inputs(run: Run) -> dict[str, Any]:
    """What the sparse network is made from."""
    goal = run.one_shot
    masks = goal.config.masks.model_dump(mode="json", include={"pattern", "only", "keep", "share"})
    return {
        **training_inputs(run, run.config.sparsify),
        **calibration_inputs(run),
        "weights": run.weights_sha256("dense"),
        "graph": run.graph().sha256(),
        "budget": budget_inputs(goal),
        "masks": {**masks, "scope": weight_target(goal).scope},
    }


def sparse_policies(run: Run) -> list[MakePolicy]:
    """What `sparsify` trains with."""
    settings = run.config.sparsify
    return policies(settings.method, settings.strength, _aim(run))


def unmet_aim(last: Record) -> str | None:
    """What to do where a penalty has left more than was to remain: the cut then takes channels or weights that are not zero."""
    if last.get("remains", 0.0) <= last.get("aim", 1.0):
        return None
    return (
        f"{last['remains']:.1%} is not zero, the aim is {last['aim']:.1%}; what is removed has some weight left. Raise sparsify.strength "
        "or sparsify.epochs to get there."
    )


def check_shards(run: Run) -> None:
    """What needs whole weights on every worker does not go where workers hold networks together; and so it shows before everything."""
    workers, settings = run.config.workers, run.config
    if workers.shard_over == 1:
        return
    if workers.num_workers is not None and workers.num_workers % workers.shard_over:
        raise ValueError(
            f"workers.shard_over ({workers.shard_over}) workers hold a network together, and workers.num_workers ({workers.num_workers}) is no "
            "multiple of that. Change one of them."
        )
    for training in ("train", "recover"):
        streams = getattr(settings, training).num_streams
        if getattr(settings, training).epochs and streams < workers.shard_over:
            raise ValueError(
                f"workers.shard_over ({workers.shard_over}) workers train together, and {training}.num_streams ({streams}) feeds fewer. Raise it."
            )
    kinds = kinds_needed(run)
    wrong = {
        f"sparsify.method ({', '.join(settings.sparsify.method)})": bool(settings.sparsify.method),
        "criterion movement": "movement" in kinds,
        "a criterion that multiplies with the Hessian (obd, grasp)": bool(kinds & {*CURVATURE_KINDS}),
    }
    for what in (what for what, there in wrong.items() if there):
        raise ValueError(
            f"{what} needs whole weights on every worker, and with workers.shard_over ({workers.shard_over}) each has some rows of them. Set it "
            "to 1, or choose another method."
        )


def check_methods(run: Run) -> None:
    """Methods that do not exist, or whose aim the run does not state, show before everything."""
    settings, masks = run.config.sparsify, run.config.masks
    keep = run.config.budget.params if one_budget(run) else masks.keep
    require_aims(settings.method, budget=run.config.budget.given, pattern=masks.pattern, keep=keep)
    if masks.pattern and "hard_concrete" in masks.criterion and run.config.budget.given:
        raise ValueError(
            "masks.criterion hard_concrete reads gates of single weights; with a budget for channels the gates are theirs. Choose another "
            "criterion for the masks, such as magnitude, or leave the budget out and give masks.keep."
        )


def _aim(run: Run) -> Aim:
    settings, target = run.config.sparsify, weight_target(run)
    return Aim(
        graph=run.graph(),
        budget=channel_budget(run),
        min_keep=run.config.budget.min_keep,
        plan_of=_plan_of(run),
        names=target.names,
        pattern=target.pattern,
        keep=target.keep,
        scope=target.scope,
        every=settings.update_every_steps,
        settled_after=settings.settled_after,
        exchange=settings.exchange,
        gate_lr=settings.gate_lr,
    )


def _plan_of(run: Run) -> PlanOf | None:
    """What the budget leaves by norms of channels; they have no common unit, so every group loses the same part by default."""
    settings, budget = run.config.budget, channel_budget(run)
    if budget is None:
        return None
    make = partial(allocation.plan, run.graph(), budget=budget, criterion="magnitude_l2")
    scope = "layer" if settings.scope == "auto" else settings.scope
    return partial(make, scope=scope, min_keep=settings.min_keep, round_to=settings.round_to)


def _keep(run: Run, name: str, result: TrainResult) -> None:
    """RUN/networks/NAME.safetensors, and NAME-statistics.safetensors if there are any."""
    if result.statistics:
        run.save_network(f"{name}-statistics", result.statistics)
    run.save_network(name, result.state_dict)


def recovered(run: Run) -> list[str]:
    return networks(run) if run.config.controls.recover else ["ours"]


def recover(run: Run) -> None:
    """RUN/networks/NAME-recovered.safetensors: trained after the cut, taught by the dense network that the run was given."""
    settings = run.config.recover
    if not settings.epochs:
        run.say("recover: left out, recover.epochs is 0")
        return
    for name in recovered(run):
        inputs = {**training_inputs(run, settings), "weights": run.weights_sha256(f"{name}-calibrated")}

        stage = "recover" if name == "ours" else f"recover-{name}"

        def work(name: str = name, stage: str = stage) -> None:
            model = run.sent(f"{name}-calibrated", plan=name)
            teacher = run.first.sent("dense") if settings.distill_weight else None
            masks = run.weight_masks(name)
            policies = [partial(Masked, masks=masks)] if masks else []
            result = run_training(run, stage, settings, model, teacher, policies=policies)
            run.save_network(f"{name}-recovered", result.state_dict)

        run.stage(stage, inputs, run.path("networks", f"{name}-recovered.safetensors"), work)


# --- both -----------------------------------------------------------------------------------------------------------


def training_inputs(run: Run, training: TrainingConfig) -> dict[str, Any]:
    no_part = {"checkpoint_every_steps", "loader_processes"}
    if training.rewind_epochs is None:
        no_part.add("rewind_epochs")
    return {
        **training.model_dump(mode="json", exclude=no_part),
        "rows": run.train_rows.fingerprint,
        "input": vars(run.input),
        "seed": run.config.seed,
    }


def training_order(run: Run, training: TrainingConfig) -> TrainingOrder:
    return TrainingOrder(run.train_rows.row_groups, training.num_streams, training.batch_size, seed=run.config.seed)


def run_training(
    run: Run,
    stage: str,
    training: TrainingConfig,
    model: Network,
    teacher: Network | None,
    *,
    policies: Sequence[MakePolicy] = (),
) -> TrainResult:
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
    num_workers = training_workers(run, training)
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
    events = EventFile(run.path("tensorboard", stage))
    with progress("train" if stage == "dense" else stage, total=total, unit="rows", quiet=config.quiet) as bar:

        def show(history: Any) -> None:
            if history:
                told = {name: history[-1][name] for name in ("loss", "zeros") if name in history[-1]}
                bar.update(history[-1]["step"] * training.batch_size, **told)
                run.watcher.trained(run, stage, history)
                tell_tensorboard(history)

        def tell_tensorboard(history: Any) -> None:
            try:
                events.write(history)
            except StorageError as error:  # for people: not worth the training
                run.say(f"{stage}: TensorBoard is not told: {error}")

        result = fit(
            model,
            teacher,
            make_batches,
            settings,
            steps_per_epoch=order.steps_per_epoch,
            policies=policies,
            fingerprint=artifacts.sha256_of({**training_inputs(run, training), "model": digest(_weights(model))}),
            directory=run.scratch("checkpoints", stage),
            num_workers=num_workers,
            shard_over=config.workers.shard_over,
            use_gpu=run.device == "cuda",
            threads=config.workers.threads,
            max_failures=config.workers.max_failures,
            on_progress=show,
        )
    tell_tensorboard(result.history)  # also of a training that was over before, when the driver died
    return result


def training_workers(run: Run, training: TrainingConfig) -> int:
    """As many as there are streams for, in whole lines of those that hold a network together."""
    shard_over = run.config.workers.shard_over
    return max(shard_over, min(run.num_workers, training.num_streams) // shard_over * shard_over)


def _weights(network: Network) -> Mapping[str, Tensor]:
    return artifacts.read_tensors(network.path) if isinstance(network, Stored) else network.state_dict()


SHARED_SETTINGS = {
    "batch_size",
    "lr",
    "min_lr",
    "warmup_epochs",
    "rewind_epochs",
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
