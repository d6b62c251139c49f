"""Saliency in one process: statistics of some batches, then a criterion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from pipeline.models.graph import Graph
from pipeline.saliency import criteria
from pipeline.saliency.curvature import CURVATURE_KINDS
from pipeline.saliency.statistics import INPUT_KINDS, TRAINING_KINDS, WEIGHT_KINDS, accumulate


def score(
    model: nn.Module,
    graph: Graph,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    criterion: str | Sequence[str] = "taylor",
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Saliency of every channel, by group: float64 [C], higher = keep. The model stays as it is.

    Args:
        batches: (images float [N, C, H, W], labels int64 [N]); not read by criteria that need weights alone.
        criterion: name in saliency.criteria.CRITERIA; of several names the ranks are fused.
        seed: of the `random` criterion.

    Raises:
        ValueError: an unknown criterion, or one that needs batches and got none, or a second pass, which only a run makes.
    """
    rule = criteria.rule("channels", *((criterion,) if isinstance(criterion, str) else criterion))
    needs = {*rule.needs}
    if missing := needs & {*CURVATURE_KINDS, *TRAINING_KINDS}:
        raise ValueError(
            f"criterion '{rule.name}' needs {', '.join(sorted(missing))}, which one pass over batches does not give. Start a run "
            f"with score.criterion={rule.name}, or choose another criterion."
        )
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    statistics: dict[str, Tensor] = {}
    if needs:
        kinds = {"weights": bool(needs & {*WEIGHT_KINDS}), "inputs": bool(needs & {*INPUT_KINDS})}
        statistics = accumulate(model, graph, batches, **kinds)
        if not statistics:
            raise ValueError(f"criterion '{rule.name}' needs batches of (images, labels), and there was none.")
    saliency: dict[str, Tensor] = rule.fn(graph, statistics, weights, seed)
    return saliency
