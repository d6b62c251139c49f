"""The stage that makes the smaller networks and proves that they equal the masked one."""

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
from pipeline.stages.planning import cut_inputs, networks

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
