"""How far a plan and its saliency have settled: pure comparisons of two plans, two saliencies, a saliency and its error."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.pruning.plan import Plan
from pipeline.saliency.criteria import ranks


def plan_change(first: Plan, second: Plan) -> float:
    """Share of the removed channels that the two plans do not have in common: 0 for the same plan, 1 for no channel in common.

    The complement of Dice's coefficient over the sets of removed channels. A removed block counts as one more.
    """
    removed_of = [
        {(group.name, channel) for group in plan.groups for channel in group.removed}
        | {(block.key, 0) for block in plan.blocks}
        for plan in (first, second)
    ]
    total = len(removed_of[0]) + len(removed_of[1])
    return len(removed_of[0] ^ removed_of[1]) / total if total else 0.0


def rank_correlation(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Spearman's rank correlation over all channels of all groups; 1 where either ranks all channels alike."""
    a, b = (ranks(torch.cat([saliency[name].double() for name in sorted(first)])) for saliency in (first, second))
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite] - a[finite].mean(), b[finite] - b[finite].mean()
    norm = a.norm() * b.norm()
    return float(a @ b / norm) if norm > 0 else 1.0


def relative_error(saliency: Mapping[str, Tensor], error: Mapping[str, Tensor]) -> dict[str, float]:
    """Median and 90 % quantile over the channels of standard error / saliency; channels without saliency have none."""
    score, spread = (torch.cat([part[name].double() for name in sorted(saliency)]) for part in (saliency, error))
    relative = (spread / score.abs())[score != 0].sort().values
    if len(relative) == 0:
        return {"median": 0.0, "p90": 0.0}
    return {"median": float(relative[len(relative) // 2]), "p90": float(relative[int(0.9 * (len(relative) - 1))])}
