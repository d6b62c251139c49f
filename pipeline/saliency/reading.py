"""Reading statistics and weights: what is missing is named with the way out."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class MissingStatistics(ValueError):
    """A rule needs a statistic that was not stored."""


def statistic(statistics: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in statistics:
        kinds = sorted({name.split("/")[0] for name in statistics if "@" not in name})
        raise MissingStatistics(
            f"statistic {key!r} is missing; the stored kinds are: {', '.join(kinds) or 'none'}. Run the scoring pass on this network with "
            "score.statistics naming what the criterion needs, or choose one that needs no rows, like magnitude_l2."
        )
    return statistics[key]


def num_rows(statistics: Mapping[str, Tensor]) -> int:
    rows = int(statistic(statistics, "rows"))
    if rows < 1:
        raise ValueError("statistic 'rows' is 0: nothing was scored. Give score.num_rows at least one row.")
    return rows


def weight_of(weights: Mapping[str, Tensor], tensor: str) -> Tensor:
    """float64 on the CPU."""
    if tensor not in weights:
        raise ValueError(f"weights lack {tensor}; pass the state_dict of the network that was traced.")
    return weights[tensor].detach().cpu().double()
