"""Stages that make the smaller networks, prove that they equal the masked one, and re-estimate their statistics."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from pipeline import artifacts
from pipeline.data.batches import unit_batches
from pipeline.data.units import Units
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.verify import verify
from pipeline.run import Run
from pipeline.stages.masking import before_calibration, masks_inputs
from pipeline.stages.planning import cut_inputs, networks
from pipeline.training.calibrate import BatchNormStatistics, apply_statistics

VERIFY_ROWS = 16


def cut_and_verify(run: Run) -> None:
    """RUN/networks/NAME-cut.safetensors, RUN/verify.json: the cut network equals the masked dense one on real rows."""

    def work() -> None:
        images, found = example_images(run, VERIFY_ROWS), {}
        for name in networks(run):
            start = run.start_of(name)
            network = start.network(start.parent)
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
    """RUN/networks/NAME-calibrated.safetensors: batch-norm statistics of the pruned networks, re-estimated on training rows."""
    settings = run.config.calibrate
    num_rows = min(
        settings.batches * settings.batch_size, run.train_rows.num_rows // settings.batch_size * settings.batch_size
    )
    made_from = {**cut_inputs(run), **masks_inputs(run)}
    if not num_rows:

        def keep() -> None:
            for name in networks(run):
                network = run.network(before_calibration(run, name), plan=name)
                run.save_network(f"{name}-calibrated", network.state_dict())

        run.stage("calibrate", {**made_from, "batches": 0}, run.path("networks"), keep)
        return
    units = Units(run.train_rows.row_groups, settings.batch_size, num_rows)
    inputs = run.pass_inputs(run.train_rows, units, settings.batch_size, **made_from)

    def work() -> None:
        models = {name: run.network(before_calibration(run, name), plan=name) for name in networks(run)}
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
