"""Criteria by name: the rule that each has for channels and for weights, what it reads, and how it competes.

One scoring pass serves every criterion. Loss-based scores are all in units of the loss, so groups and layers may compete
("global"). Scores of weights alone are not: a layer with large weights is no more important than one with small
weights behind a norm. There every layer keeps the same fraction by default ("layer"), which also protects against
emptying one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.models.graph import Graph
from pipeline.saliency import channel_rules as channels
from pipeline.saliency import weight_rules as weights
from pipeline.saliency.channel_rules import Saliency

Target = Literal["channels", "weights"]


@dataclass(frozen=True, slots=True)
class Rule:
    """A function and what it needs."""

    fn: Callable[..., Any]
    """For channels fn(graph, statistics, weights, seed) -> {group: float64 [C]}; for weights fn(tensor, statistics, weights, seed) ->
    float64 like the tensor. `weights` is the state_dict of the dense network."""
    needs: tuple[str, ...]
    """Kinds of statistics, the part of their keys before "/"; empty: weights alone, no scoring pass."""
    scope: str
    """How groups (pruning.allocation.SCOPES) or tensors (pruning.sparsity) compete unless a run says otherwise."""
    name: str = ""
    error: tuple[str, str] | None = None
    """Kinds whose sums over rows give the score's standard error: of the values, and of their squares."""
    blocks: bool = True
    """Of rules for channels: does it give a number to residual blocks, too?"""


@dataclass(frozen=True, slots=True)
class Criterion:
    """What a name stands for; None where the criterion has no meaning."""

    channels: Rule | None = None
    weights: Rule | None = None


def _summed(rule: Rule) -> Criterion:
    return Criterion(Rule(channels.summed(rule.fn), rule.needs, "global"), rule)


def _channels_only(fn: Callable[..., Any], needs: tuple[str, ...] = ()) -> Rule:
    return Rule(fn, needs, "layer", blocks=False)


def _loss(fn: Callable[..., Any], kind: str, error: tuple[str, str] | None = None) -> Rule:
    return Rule(fn, (kind, "rows"), "global", error=error)


MAGNITUDE = Rule(weights.magnitude, (), "layer")
_GATE_ERROR = ("gate_abs", "gate_square")
_SQUARE_ERROR = ("gate_square", "gate_fourth")

CRITERIA: dict[str, Criterion] = {
    "taylor": Criterion(_loss(channels.taylor, "gate_abs", _GATE_ERROR)),
    "taylor_square": Criterion(_loss(channels.taylor_square, "gate_square", _SQUARE_ERROR)),
    "signed_taylor": Criterion(_loss(channels.signed_taylor, "gate_sum")),
    "fisher": Criterion(_loss(channels.fisher, "gate_square", _SQUARE_ERROR), _loss(weights.fisher, "grad_square")),
    "group_fisher": Criterion(Rule(channels.group_fisher, ("gate_square", "rows"), "flat")),
    "activation_mean": Criterion(_channels_only(channels.activation_mean, ("input_sum", "input_square"))),
    "activation_variance": Criterion(_channels_only(channels.activation_variance, ("input_sum", "input_square"))),
    "magnitude": Criterion(Rule(channels.magnitude_l2, (), "layer"), MAGNITUDE),
    "magnitude_l1": Criterion(Rule(channels.magnitude_l1, (), "layer"), MAGNITUDE),
    "magnitude_l2": Criterion(Rule(channels.magnitude_l2, (), "layer"), MAGNITUDE),
    "bn_scale": Criterion(_channels_only(channels.bn_scale)),
    "random": Criterion(Rule(channels.random, (), "layer"), Rule(weights.random, (), "layer")),
    "gradient": _summed(_loss(weights.gradient, "grad_abs")),
    "snip": _summed(_loss(weights.snip, "grad_sum")),
    "snip_abs": _summed(_loss(weights.snip_abs, "grad_abs")),
    "obd": _summed(_loss(weights.obd, "hessian_diag")),
    "grasp": _summed(_loss(weights.grasp, "hessian_grad")),
    "movement": _summed(Rule(weights.movement, ("movement",), "global")),
    "hard_concrete": Criterion(
        Rule(channels.hard_concrete, ("gate_open",), "flat", blocks=False),
        Rule(weights.hard_concrete, ("gate_open",), "global"),
    ),
    "lamp": Criterion(weights=Rule(weights.lamp, (), "global")),
    "wanda": Criterion(weights=Rule(weights.wanda, ("input_square",), "row")),
}


def rule(target: Target, *names: str, shares: Sequence[float] = ()) -> Rule:
    """The rule of a criterion for channels or for weights; of several, one that fuses their ranks.

    Args:
        shares: weight of each name in the fused rank; empty: all alike.

    Raises:
        ValueError: an unknown name, one that has no rule for the target, or shares that do not fit. Lists the known ones.
    """
    if not names:
        raise ValueError(f"no criterion is given; known for {target}: {known(target)}.")
    found = [_find(target, name) for name in names]
    if shares and (len(shares) != len(names) or min(shares) <= 0):
        raise ValueError(
            f"criterion weights {list(shares)} do not fit the criteria {list(names)}: give one positive number for each."
        )
    if len(found) == 1:
        return found[0]
    return _fused(target, found, [share / sum(shares) for share in shares] if shares else [1 / len(found)] * len(found))


def known(target: Target) -> str:
    return ", ".join(sorted(name for name, criterion in CRITERIA.items() if getattr(criterion, target)))


def _find(target: Target, name: str) -> Rule:
    criterion = CRITERIA.get(name)
    if criterion is None:
        raise ValueError(f"criterion {name!r} is unknown; known criteria for {target}: {known(target)}.")
    chosen: Rule | None = getattr(criterion, target)
    if chosen is None:
        raise ValueError(f"criterion {name!r} has no rule for {target}; known criteria for {target}: {known(target)}.")
    return replace(chosen, name=name)


# --- joint criteria ----------------------------------------------------------------------------------------------------


def _fused(target: Target, rules: Sequence[Rule], shares: Sequence[float]) -> Rule:
    """Weighted mean of the rules' ranks, as fractions in (0, 1]: what it takes to join scores without a common unit.

    Channels are ranked over all groups if every rule competes there, otherwise within each group; blocks among themselves, weights
    within their tensor. Ranks are no losses, so they are not divided by costs: the scope is "flat", or "layer".

    Source: mean rank of Dwork et al., "Rank Aggregation Methods for the Web", WWW 2001 (Borda's method).
    """
    everywhere = target == "channels" and all(rule.scope in ("global", "flat") for rule in rules)
    with_blocks = all(rule.blocks for rule in rules)

    def for_channels(
        graph: Graph, statistics: Mapping[str, Tensor], state: Mapping[str, Tensor], seed: int
    ) -> Saliency:
        groups = [[group.name for group in graph.groups]] if everywhere else [[group.name] for group in graph.groups]
        sets = [*groups, [block.key for block in graph.blocks] if with_blocks else []]
        sizes = graph.scored()
        fused: Saliency = {}
        scores = [rule.fn(graph, statistics, state, seed) for rule in rules]
        for names in (names for names in sets if names):
            ranked = [
                share * ranks(torch.cat([score[name] for name in names]))
                for score, share in zip(scores, shares, strict=True)
            ]
            parts = reduce(torch.add, ranked).split([sizes[name] for name in names])
            fused |= {name: part.clone() for name, part in zip(names, parts, strict=True)}
        return fused

    def for_weights(tensor: str, statistics: Mapping[str, Tensor], state: Mapping[str, Tensor], seed: int) -> Tensor:
        scores = [
            share * ranks(rule.fn(tensor, statistics, state, seed)) for rule, share in zip(rules, shares, strict=True)
        ]
        return torch.stack(scores).sum(0)

    equal = len(set(shares)) == 1
    names = [rule.name if equal else f"{share:g} {rule.name}" for rule, share in zip(rules, shares, strict=True)]
    return Rule(
        for_channels if target == "channels" else for_weights,
        tuple(dict.fromkeys(kind for rule in rules for kind in rule.needs)),
        "flat" if everywhere else "layer",
        " + ".join(names),
        blocks=with_blocks,
    )


def ranks(score: Tensor) -> Tensor:
    """Rank of each entry as a fraction in (0, 1], equals share their mean rank; +inf (keep in any case) stays."""
    if score.isnan().any():
        raise ValueError("a score is NaN, which has no rank. The network or its loss gave no number there.")
    values, inverse, counts = score.reshape(-1).unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    mean_rank = last - (counts - 1) / 2
    ranked = torch.where(values.isinf(), values, mean_rank / score.numel())
    return ranked[inverse].reshape(score.shape)
