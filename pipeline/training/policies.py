"""The methods of sparse training by name: what each acts on, and how it is made from what a run aims at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from pipeline.models.graph import Graph
from pipeline.pruning.plan import Budget
from pipeline.training import dynamic, gates, penalties
from pipeline.training.penalties import PlanOf
from pipeline.training.policy import MakePolicy


@dataclass(frozen=True, kw_only=True)
class Aim:
    """What is to be reached, in plain arguments; of the two parts only that is needed on which the method acts."""

    graph: Graph
    budget: Budget | None = None
    """For channels; None: none are removed."""
    min_keep: float = 0.1
    """Of each group, whatever the budget."""
    plan_of: PlanOf | None = None
    """The channels that stay within the budget, by a saliency. Picklable."""
    names: Sequence[str] = ()
    """Weights that masks may cover, and that penalties of single weights act on."""
    pattern: str | None = None
    """Of the masks; None: no weights are masked."""
    keep: float | None = None
    """Fraction of these weights that stays, where the pattern leaves it open."""
    scope: str = "layer"
    every: int = 20
    settled_after: float = 0.75
    exchange: float = 0.3
    gate_lr: float = 0.1


@dataclass(frozen=True, slots=True)
class Method:
    """One way to train towards zeros."""

    make: Callable[[Aim, float], MakePolicy]
    """(aim, strength) -> policy of the workers."""
    acts_on: Literal["weights", "channels", "masks", "either"]
    """Single weights; channels within budget.params or budget.macs; masks of weights (masks.pattern); channels if there is a budget for
    them, otherwise masks."""
    strength: float = 0.0
    """Default; 0: it has none."""
    scope: str | None = None
    """How channels have to compete afterwards, where a criterion would take the same part of every group: what is zero lies elsewhere."""


def _on_weights(kind: type) -> Callable[[Aim, float], MakePolicy]:
    return lambda aim, strength: partial(kind, names=aim.names, strength=strength, keep=aim.keep or 0.0)


def _on_groups(kind: type) -> Callable[[Aim, float], MakePolicy]:
    def make(aim: Aim, strength: float) -> MakePolicy:
        assert aim.budget is not None
        until = {"measure": aim.budget.measure, "fraction": aim.budget.fraction, "min_keep": aim.min_keep}
        return partial(kind, graph=aim.graph, strength=strength, **until)

    return make


def _growing(aim: Aim, strength: float) -> MakePolicy:
    assert aim.plan_of is not None
    kind = partial(penalties.Growing, every=aim.every, settled_after=aim.settled_after)
    return partial(kind, graph=aim.graph, strength=strength, plan_of=aim.plan_of)


def _soft_filter(aim: Aim, strength: float) -> MakePolicy:
    assert aim.plan_of is not None
    kind = partial(dynamic.SoftFilter, every=aim.every, settled_after=aim.settled_after)
    return partial(kind, graph=aim.graph, plan_of=aim.plan_of)


def _masks(kind: type, **more: str) -> Callable[[Aim, float], MakePolicy]:
    def make(aim: Aim, strength: float) -> MakePolicy:
        assert aim.pattern is not None
        options = {"names": aim.names, "pattern": aim.pattern, "keep": aim.keep, "scope": aim.scope}
        timing = {"every": aim.every, "settled_after": aim.settled_after}
        return partial(kind, **options, **timing, **{name: getattr(aim, field) for name, field in more.items()})

    return make


def _hard_concrete(aim: Aim, strength: float) -> MakePolicy:
    if aim.budget is not None:
        channels = partial(gates.channel_gates, graph=aim.graph, min_keep=aim.min_keep)
        channels = partial(channels, measure=aim.budget.measure, budget=aim.budget.fraction)
        return partial(channels, lr=aim.gate_lr, settled_after=aim.settled_after)
    assert aim.keep is not None
    weights = partial(gates.weight_gates, names=aim.names, budget=aim.keep)
    return partial(weights, lr=aim.gate_lr, settled_after=aim.settled_after)


METHODS: dict[str, Method] = {
    "l1_sign": Method(_on_weights(penalties.L1Sign), "weights", 1.0),
    "l1_prox": Method(_on_weights(penalties.L1Prox), "weights", 4.0),
    "l0_sign": Method(_on_weights(penalties.L0Sign), "weights", 1.0),
    "group_lasso": Method(_on_groups(penalties.GroupLasso), "channels", 4.0, scope="flat"),
    "bn_slimming": Method(_on_groups(penalties.BnSlimming), "channels", 8.0, scope="flat"),
    "growing": Method(_growing, "channels", 10.0),
    "hard_concrete": Method(_hard_concrete, "either"),
    "soft_filter": Method(_soft_filter, "channels"),
    "cubic": Method(_masks(dynamic.Cubic), "masks"),
    "rigl": Method(_masks(dynamic.RigL, exchange="exchange"), "masks"),
    "dpf": Method(_masks(dynamic.DynamicPruningWithFeedback), "masks"),
}
"""Name in `sparsify.method` -> what it is."""


def policies(names: Sequence[str], strengths: Sequence[float], aim: Aim) -> list[MakePolicy]:
    """The policies of a training, in the given order.

    Args:
        strengths: one for each name; empty: each one's default.

    Raises:
        ValueError: see `require_aims`.
    """
    require_aims(names, budget=aim.budget is not None, pattern=aim.pattern, keep=aim.keep)
    methods = [METHODS[name] for name in names]
    given = strengths or [method.strength for method in methods]
    # Zeros of a mask would meet the aim of a penalty at once, and it would then hold them, whatever the mask does later.
    masks = any(method.acts_on == "masks" for method in methods)
    aims = [replace(aim, keep=None) if masks and method.acts_on == "weights" else aim for method in methods]
    return [method.make(own, strength) for method, own, strength in zip(methods, aims, given, strict=True)]


def scope_after(names: Sequence[str], scope: str) -> str:
    """How channels compete after a training with these methods, by a criterion whose own scope is `scope`."""
    own = [found for name in names if (found := METHODS[name].scope)]
    return own[0] if own and scope == "layer" else scope


def require_aims(names: Sequence[str], *, budget: bool, pattern: str | None, keep: float | None) -> None:
    """ValueError for a method that is unknown, or whose aim is not stated; with the way out."""
    for name in names:
        if name not in METHODS:
            raise ValueError(f"sparsify.method {name!r} is unknown; known methods: {', '.join(METHODS)}.")
        acts_on = METHODS[name].acts_on
        if acts_on == "channels" and not budget:
            raise ValueError(
                f"sparsify.method {name} acts on channels: give budget.params or budget.macs, the fraction that remains."
            )
        if acts_on == "masks" and pattern is None:
            raise ValueError(
                f"sparsify.method {name} masks weights: give masks.pattern, and masks.keep, the fraction that stays."
            )
        if name == "rigl":
            dynamic.require_single_weights(pattern)
        if acts_on == "either" and not budget and keep is None:
            raise ValueError(
                f"sparsify.method {name} needs an aim: budget.params or budget.macs for channels, or masks.keep for single weights."
            )
