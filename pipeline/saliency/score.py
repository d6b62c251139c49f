"""Saliency in one process: statistics of some batches, then a criterion."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from pipeline.models.graph import Graph
from pipeline.saliency import criteria
from pipeline.saliency.statistics import WEIGHT_KINDS, accumulate


def score(
    model: nn.Module,
    graph: Graph,
    batches: Iterable[tuple[Tensor, Tensor]] = (),
    criterion: str = "taylor",
    *,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Saliency of every channel, by group: float64 [C], higher = keep. The model stays as it is.

    Args:
        batches: (images float [N, C, H, W], labels int64 [N]); not read by criteria that need weights alone.
        criterion: name in saliency.criteria.CRITERIA.
        seed: of the `random` criterion.

    Raises:
        ValueError: an unknown criterion, or one that needs batches and got none.
    """
    chosen = criteria.find(criterion)
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    statistics = (
        accumulate(model, graph, batches, weights=bool({*chosen.needs} & {*WEIGHT_KINDS})) if chosen.needs else {}
    )
    if chosen.needs and not statistics:
        raise ValueError(f"criterion '{criterion}' needs batches of (images, labels), and there was none.")
    return chosen.fn(graph, statistics, weights, seed)
