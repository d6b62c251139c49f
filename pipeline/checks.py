"""`python -m pipeline verify RUN`: do the files still say what the report says, and does the cut still equal the mask?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from pipeline import artifacts
from pipeline.export import artifact, onnx
from pipeline.pruning.masks import channel_masks, load_masks, masks_sha256, not_zero_where_masked
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.verify import verify
from pipeline.run import Run
from pipeline.stages.cutting import VERIFY_ROWS, example_images
from pipeline.stages.planning import networks
from pipeline.stages.quantising import int8_sha256


def check_run(run: Run) -> Iterator[str]:
    """One line for each check. Raises ValueError at the first that fails."""
    summary = artifacts.read_json(run.path("report", "summary.json"))
    plan, weight_masks = run.plan("ours"), run.weight_masks("ours")
    masks = load_masks(run.path("masks.safetensors"))
    found = {"plan": plan.sha256(), "masks": masks_sha256(masks)}
    found |= {"weight_masks": masks_sha256(weight_masks)} if weight_masks else {}
    if (summary.get("compression") or {}).get("sha256") is not None:
        found["compression"] = int8_sha256(run)
    for name, sha256 in found.items():
        if summary[name]["sha256"] != sha256:
            raise ValueError(
                f"{name}: the report says {summary[name]['sha256']}, the file has {sha256}. One of them was changed."
            )
        yield f"{name}: sha256 {sha256} as reported"
    if masks_sha256(channel_masks(plan)) != found["masks"]:
        raise ValueError("masks.safetensors does not hold the masks of plan.json. One of them was changed.")
    yield "masks: those of the plan"
    images = example_images(run, VERIFY_ROWS)
    for one in run.rounds:
        yield from _check_cuts(one, images)
    model = artifact.load(run.path("model"))
    yield f"model: {sum(p.numel() for p in model.parameters()):,} parameters, loads without pickle"
    if weight_masks:
        yield f"model: {_num_zeros(model, weight_masks):,} of its weights are masked, and zero"
    for file, check in (("model.onnx", onnx.check_onnx), ("model.pt2", onnx.check_program)):
        path = run.path("model", file)
        if artifacts.exists(path):
            yield f"{file}: equals the model on a row (relative {check(path, model, images[:1]).max_rel:.2g})"


def _check_cuts(run: Run, images: Tensor) -> Iterator[str]:
    for name in networks(run):
        start, where = run.start_of(name), f", round {run.number}" if run.given.rounds > 1 else ""
        parent, plan = start.network(start.parent), run.plan(name)
        difference = verify(cut(parent, plan), mask(parent, plan), images).require()
        yield (
            f"cut {name}{where}: equals the masked dense network on {difference.rows} rows "
            f"(max abs {difference.max_abs:.2g}, relative {difference.max_rel:.2g})"
        )


def _num_zeros(model: nn.Module, masks: Mapping[str, Tensor]) -> int:
    """Weights that the masks remove. Raises ValueError if the model has others there than zeros."""
    for name in not_zero_where_masked(model.state_dict(), masks):
        raise ValueError(f"model: {name} has weights where its mask has none. One of them was changed.")
    return sum(int((~kept).sum()) for kept in masks.values())
