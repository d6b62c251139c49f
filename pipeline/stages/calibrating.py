"""Re-estimation of batch-norm statistics on training rows, wherever weights have changed behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.data.units import Units
from pipeline.models.sharding import Network
from pipeline.run import Run
from pipeline.stages.masking import before_calibration, masks_inputs
from pipeline.stages.planning import cut_inputs, networks
from pipeline.training.calibrate import BatchNormStatistics, apply_statistics, batch_norms


def calibrate(run: Run) -> None:
    """RUN/networks/NAME-calibrated.safetensors: the pruned networks with statistics of their own."""
    made_from, units = {**cut_inputs(run), **masks_inputs(run)}, calibration_units(run)
    batch_size = run.config.calibrate.batch_size
    inputs = run.pass_inputs(run.train_rows, units, batch_size, **made_from) if units else {**made_from, "batches": 0}

    def work() -> None:
        files = {name: before_calibration(run, name) for name in networks(run)}
        models = {name: run.network(file, plan=name) for name, file in files.items()}
        sent = {name: run.sent(file, plan=name) for name, file in files.items()}
        for name, model in reestimated(run, "calibrate", models, sent).items():
            run.save_network(f"{name}-calibrated", model.state_dict())

    run.stage("calibrate", inputs, run.path("networks"), work)


def calibration_units(run: Run) -> Units | None:
    """The rows that statistics are estimated on, whole batches of them; None where the configuration wants none."""
    settings, rows = run.config.calibrate, run.train_rows
    num_rows = min(settings.batches, rows.num_rows // settings.batch_size) * settings.batch_size
    return Units(rows.row_groups, run.rows_per_unit(settings.batch_size), num_rows) if num_rows else None


def reestimated(
    run: Run, stage: str, models: Mapping[str, nn.Module], sent: Mapping[str, Network] | None = None
) -> dict[str, nn.Module]:
    """Copies of the networks with statistics of their own, by a pass over the data in `stage`; as they are where there is nothing to do.

    Args:
        sent: the same networks as workers get them; empty: as they are.
    """
    units = calibration_units(run)
    normed = {name: model for name, model in models.items() if batch_norms(model)}
    if units is None or not normed:
        return {**models}
    result = run.data_pass(
        stage,
        BatchNormStatistics({name: (sent or models)[name] for name in normed}),
        run.train_rows,
        units,
        micro_batch=run.config.calibrate.batch_size,
        title="re-estimate batch norm",
    )
    return {**models, **{name: apply_statistics(model, result.values, name) for name, model in normed.items()}}


def calibration_inputs(run: Run) -> dict[str, Any]:
    """What statistics are estimated on, for a stage that does so after training: whose bits no kind of device promises, either."""
    units = calibration_units(run)
    return {"calibrate": units.describe() if units else None}
