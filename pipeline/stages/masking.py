"""The stage that masks single weights of the cut networks, from the statistics that the channels were planned with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pipeline import artifacts
from pipeline.pruning.masks import masked, save_masks
from pipeline.pruning.plan import Plan
from pipeline.pruning.sparsity import Pattern, fits, fraction_within, kept_fraction, num_competing, weight_masks
from pipeline.pruning.surgery import Slices, sliced
from pipeline.run import Run
from pipeline.saliency.criteria import Rule
from pipeline.saliency.statistics import multiplied
from pipeline.stages.planning import cut_inputs, mask_rules, one_budget, statistics, sums_sha256


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """Scores of a cut network's weights by name, each worked out when it is looked at: in memory is one layer at a time.

    The rule sees the uncut network, which the statistics are of; what it says about removed entries falls away.
    """

    rule: Rule
    names: list[str]
    stored: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    seed: int
    slices: Slices

    def __getitem__(self, name: str) -> Tensor:
        return sliced(self.rule.fn(name, self.stored, self.weights, self.seed), self.slices.get(name, {}))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# --- what others ask ------------------------------------------------------------------------------------------------


def check_masks(run: Run) -> None:
    """A pattern that does not exist, or a fraction that it does not go with, shows before everything."""
    settings, budget = run.config.masks, run.config.budget
    if settings.pattern is None or one_budget(run):
        return
    if Pattern.parse(settings.pattern).num_keep is None and settings.keep is None and budget.macs is not None:
        raise ValueError(
            f"masks.pattern {settings.pattern} with budget.macs ({budget.macs}) needs masks.keep: MACs say nothing about how many "
            "weights stay. Give masks.keep, the fraction that stays; or budget.params, which counts channels and weights together."
        )
    kept_fraction(settings.pattern, settings.keep)


def require_maskable(run: Run) -> None:
    """Masks of nothing show before the scoring."""
    for rule in mask_rules(run).values():
        _require_some(run, rule, *_maskable(run, rule, run.network("dense"), _given_fraction(run)))


def masks_inputs(run: Run) -> dict[str, Any]:
    """What stages after the masks are made from beside the cut networks; nothing where there are no masks."""
    if run.config.masks.pattern is None:
        return {}
    about = artifacts.read_json(run.path("weight_masks.json"))
    return {"weight_masks": {name: one["sha256"] for name, one in about.items()}}


def before_calibration(run: Run, name: str) -> str:
    """Name of a pruned network's weights as they are before anything is re-estimated or trained."""
    return f"{name}-cut" if run.config.masks.pattern is None else f"{name}-masked"


@dataclass(frozen=True)
class WeightTarget:
    """What training with changing masks, or with penalties of single weights, aims at: what the masks of this run will be like."""

    names: tuple[str, ...]
    pattern: str | None
    keep: float | None
    """Fraction of these weights that stays; None where the pattern says it, or where nothing is masked."""
    scope: str


def weight_target(run: Run) -> WeightTarget:
    settings, rules, network = run.config.masks, mask_rules(run), run.network("dense")
    if settings.pattern is None:
        names = [name for name in multiplied(network, run.graph()) if fnmatchcase(name, settings.only)]
        return WeightTarget(tuple(names), None, None, "layer")
    names, _ = _maskable(run, rules["ours"], network, _given_fraction(run))
    keep = settings.keep
    if one_budget(run):
        assert run.config.budget.params is not None
        keep = run.config.budget.params**settings.share
    return WeightTarget(tuple(names), settings.pattern, keep, _scope(run, rules["ours"]))


# --- the stage ------------------------------------------------------------------------------------------------------


def mask_weights(run: Run) -> None:
    """RUN/weight_masks/NAME.safetensors (bit-packed), RUN/networks/NAME-masked.safetensors, RUN/weight_masks.json."""
    rules, together = mask_rules(run), one_budget(run)
    if not rules:
        return
    inputs = {
        **cut_inputs(run),
        "graph": run.graph().sha256(),
        "saliency": {name: sums_sha256(run, rule) for name, rule in rules.items()},
        "criteria": {name: rule.name for name, rule in rules.items()},
        "scopes": {name: _scope(run, rule) for name, rule in rules.items()},
        "seed": run.config.score.seed,
        "masks": run.config.masks.model_dump(mode="json", exclude={"share"}),
        "budget": run.config.budget.params if together else None,
    }

    def work() -> None:
        stored = statistics(run)
        about = {name: _mask(run, name, rule, stored) for name, rule in rules.items()}
        artifacts.write_json(run.path("weight_masks.json"), about)

    run.stage("mask", inputs, run.path("weight_masks.json"), work)


def _mask(run: Run, name: str, rule: Rule, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """Masks of one network, and what RUN/weight_masks.json tells about them."""
    settings, scope, plan, start = run.config.masks, _scope(run, rule), run.plan(name), run.start_of(name)
    assert settings.pattern is not None
    network = run.network(f"{name}-cut", plan=name)
    names, whole, num_keep = _chosen(start, rule, network, plan, stored)
    masks: dict[str, Tensor] = {}
    if name == "ours":
        _require_some(run, rule, names, whole)
    if names:  # a control may have been cut to shapes that no pattern fits, and is compared all the same
        parent = start.network(start.parent).state_dict()
        scores = Scores(rule, names, stored, parent, run.config.score.seed, plan.slices())
        masks = weight_masks(scores, pattern=settings.pattern, keep=settings.keep, num_keep=num_keep, scope=scope)
    run.save_network(f"{name}-masked", masked(network, masks).state_dict())
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    return {
        "pattern": settings.pattern,
        "criterion": rule.name,
        "scope": scope,
        "sha256": save_masks(run.path("weight_masks", f"{name}.safetensors"), masks),
        "kept": kept,
        "weights": total,
        "whole": whole,
        "nonzero": plan.kept.params - (total - kept),
    }


def _chosen(
    run: Run, rule: Rule, network: nn.Module, plan: Plan, stored: Mapping[str, Tensor]
) -> tuple[list[str], dict[str, str], int | None]:
    """Weights that are masked, why the others stay whole, and how many weights stay where the budget says it."""
    if not one_budget(run):
        return *_maskable(run, rule, network, _given_fraction(run), stored), None
    settings, scope, shapes = run.config.masks, _scope(run, rule), _shapes(network)
    assert settings.pattern is not None
    fraction = Fraction(1)
    while True:
        names, whole = _maskable(run, rule, network, fraction, stored)
        chosen = {name: shapes[name] for name in names}
        num_keep = _num_keep(run, plan, sum(map(math.prod, chosen.values())))
        if scope == "global":
            return names, whole, num_keep
        # What is too small for the fraction stays whole, which leaves less to the others: once more.
        within = fraction_within(chosen, pattern=settings.pattern, scope=scope, num_keep=num_keep)
        if within >= fraction:
            return names, whole, num_keep
        fraction = within


def _num_keep(run: Run, plan: Plan, maskable: int) -> int:
    """Weights that the budget leaves beside what cannot be masked."""
    budget = run.config.budget.params
    total, others = math.floor(Fraction(repr(budget)) * plan.dense.params), plan.kept.params - maskable
    if total <= others:
        raise ValueError(
            f"budget.params ({budget}) leaves {total:,} of {plan.dense.params:,} parameters, and {others:,} of the cut network cannot "
            f"be masked: norms, biases, what masks.only leaves out, and what RUN/graph.json and the pattern leave whole. Raise "
            f"budget.params, lower masks.share (now {run.config.masks.share}), so that more channels go, or widen masks.only."
        )
    return min(total - others, maskable)


def _scope(run: Run, rule: Rule) -> str:
    return rule.scope if run.config.masks.scope == "auto" else run.config.masks.scope


def _given_fraction(run: Run) -> Fraction:
    """The fraction that the configuration names; all of them where it follows from a budget."""
    settings = run.config.masks
    assert settings.pattern is not None
    return Fraction(1) if one_budget(run) else kept_fraction(settings.pattern, settings.keep)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def _require_some(run: Run, rule: Rule, names: list[str], whole: dict[str, str]) -> None:
    if not names:
        first = "; ".join(f"{name}: {why}" for name, why in list(whole.items())[:3])
        raise ValueError(
            f"masks.pattern {run.config.masks.pattern}: no weight can be masked by {rule.name}. The first reasons: {first}. "
            "Change the pattern, masks.only or masks.scope."
        )


def _maskable(
    run: Run, rule: Rule, network: nn.Module, fraction: Fraction, stored: Mapping[str, Tensor] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Weights of this network, cut or not, that are multiplied and can be masked; of the others, why they stay whole.

    Args:
        fraction: of the weights, or blocks, that stays.
        stored: statistics, of which the rule must have its own; None: not there yet.
    """
    graph, shapes, modules = run.graph(), _shapes(network), dict(network.named_modules())
    there = {*graph.parameters} & shapes.keys()
    names = list(dict.fromkeys(c.tensor for c in graph.contractions if c.tensor in there))
    reasons = {name: _why_whole(run, rule, name, shapes[name], modules, fraction, stored) for name in names}
    return [name for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why}


def _why_whole(
    run: Run,
    rule: Rule,
    name: str,
    shape: tuple[int, ...],
    modules: Mapping[str, nn.Module],
    fraction: Fraction,
    stored: Mapping[str, Tensor] | None,
) -> str:
    settings, scope = run.config.masks, _scope(run, rule)
    assert settings.pattern is not None
    pattern = Pattern.parse(settings.pattern)
    structured = pattern != Pattern()
    missing = [kind for kind in rule.needs if kind != "rows" and stored is not None and f"{kind}/{name}" not in stored]
    if not fnmatchcase(name, settings.only):
        return f"masks.only is {settings.only}"
    if not fits(shape, settings.pattern):
        return f"its shape {list(shape)} has no {settings.pattern} along the inputs"
    if (structured or scope == "row") and isinstance(modules.get(name.rpartition(".")[0]), _ConvTransposeNd):
        return "a transposed convolution has its inputs in the first dimension"
    competing = num_competing(shape, settings.pattern, scope)
    if pattern.num_keep is None and scope != "global" and int(fraction * competing) == 0:
        what = f"{competing} {'blocks' if structured else 'weights'}{' of an output' if scope == 'row' else ''}"
        return f"{float(fraction):.3g} of the {what} is less than one"
    return f"no {', '.join(missing)} is recorded of it" if missing else ""
