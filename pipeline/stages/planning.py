"""The stage that decides which channels stay, from what is stored: no pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from pipeline import artifacts
from pipeline.data.units import STRIDES
from pipeline.models.graph import Graph
from pipeline.pruning import allocation
from pipeline.pruning.masks import channel_masks, save_masks
from pipeline.pruning.plan import Budget, Plan
from pipeline.pruning.plan import planned as plan_of
from pipeline.pruning.sparsity import Pattern
from pipeline.pruning.stability import plan_change, rank_correlation, relative_error
from pipeline.run import Run
from pipeline.saliency import criteria
from pipeline.saliency.channel_rules import Saliency, standard_error
from pipeline.saliency.criteria import Rule
from pipeline.saliency.curvature import CURVATURE_KINDS
from pipeline.saliency.statistics import INPUT_KINDS, TRAINING_KINDS, WEIGHT_KINDS, GateStatistics, at_stride, by_group
from pipeline.training.policies import scope_after

STORED = {"weights": WEIGHT_KINDS, "inputs": INPUT_KINDS, "curvature": CURVATURE_KINDS}
"""What score.statistics may ask for, by kind."""


def networks(run: Run) -> list[str]:
    """The plans that are cut: ours and the controls."""
    return ["ours", *run.config.controls.criteria]


def plan_rules(run: Run) -> dict[str, Rule]:
    """The rule of each plan that is made."""
    settings = run.config.score
    ours = criteria.rule("channels", *settings.criterion, shares=settings.criterion_weights)
    ours = replace(ours, scope=scope_after(run.config.sparsify.method, ours.scope))
    return {"ours": ours, **{name: criteria.rule("channels", name) for name in run.config.controls.criteria}}


def mask_rules(run: Run) -> dict[str, Rule]:
    """The rule of each network's weight masks; empty where none are made."""
    settings = run.config.masks
    if settings.pattern is None:
        return {}
    ours = criteria.rule("weights", *settings.criterion, shares=settings.criterion_weights)
    return {"ours": ours, **{name: criteria.rule("weights", name) for name in run.config.controls.criteria}}


def kinds_needed(run: Run) -> set[str]:
    """Kinds of statistics that this run's criteria read, and those that it is asked to keep for others."""
    rules = [*(plan_rules(run).values() if run.config.budget.given else ()), *mask_rules(run).values()]
    kinds = {kind for rule in rules for kind in rule.needs}
    kinds |= {kind for name in run.config.score.statistics for kind in STORED[name]}
    if "movement" in kinds and not run.config.train.epochs:
        raise ValueError(
            "criterion 'movement' is summed while the dense network is trained: give train.epochs, or choose another criterion."
        )
    if "gate_open" in kinds and "hard_concrete" not in run.config.sparsify.method:
        raise ValueError(
            "criterion 'hard_concrete' reads gates that are trained: give sparsify.method hard_concrete and sparsify.epochs, or choose "
            "another criterion."
        )
    if run.given.rounds > 1 and (counted := kinds & {*TRAINING_KINDS}):
        raise ValueError(
            f"rounds ({run.given.rounds}): {', '.join(sorted(counted))} is counted while the dense network is trained, before the first round, "
            "and says nothing about the networks of later ones. Set it to 1, or choose another criterion."
        )
    return kinds


def one_budget(run: Run) -> bool:
    """Does one budget of parameters hold for channels and weights together?"""
    pattern, keep = run.given.masks.pattern, run.given.masks.keep
    if pattern is None or keep is not None or run.given.budget.params is None:
        return False
    return Pattern.parse(pattern).num_keep is None


def channel_budget(run: Run) -> Budget | None:
    """What the cut has to leave of the dense network that the run was given; None where nothing is cut."""
    settings = run.config.budget
    if not settings.given:
        return None
    whole = Budget(params=settings.params, macs=settings.macs)
    power = run.part * (1 - run.given.masks.share if one_budget(run) else 1)
    # Powers differ in the last digit from machine to machine, plans may not.
    return whole if power == 1 else Budget(**{whole.measure: round(whole.fraction**power, 12)})


def budget_inputs(run: Run) -> dict[str, Any]:
    """The budget as stages are made from it, and what it is a fraction of; where no block may go, blocks are no part of it."""
    settings, budget = run.config.budget, channel_budget(run)
    found = settings.model_dump(mode="json", exclude=None if settings.max_blocks else {"max_blocks"})
    found |= {"dense": run.first.graph().sha256()} if run.base else {}
    return found | (budget.as_dict() if budget else {})


def check_blocks(run: Run) -> None:
    """Where residual blocks may go, every plan's criterion has to judge them."""
    silent = [name for name, rule in plan_rules(run).items() if not rule.blocks]
    if run.config.budget.max_blocks and silent:
        raise ValueError(
            f"budget.max_blocks ({run.config.budget.max_blocks}) lets residual blocks go, and the criterion of "
            f"{', '.join(silent)} ({plan_rules(run)[silent[0]].name}) says nothing about blocks. Set it to 0, or choose a criterion like "
            "taylor or fisher, which does."
        )


def check_stop(run: Run) -> None:
    """Samples of the rows are kept of channel gates alone: nothing else can be judged, or taken, by a part of the rows."""
    others = kinds_needed(run) - GateStatistics.nested
    judged = run.config.budget.given and plan_rules(run)["ours"].needs
    if run.config.score.stop_when_stable is not None and (others or not judged):
        raise ValueError(
            f"score.stop_when_stable goes with criteria that read channel gates, such as taylor and fisher, and with nothing else; this run "
            f"reads {', '.join(sorted(others)) or 'no rows'}. Leave it out, or change score.criterion, score.statistics or masks."
        )


def statistics(run: Run) -> dict[str, Tensor]:
    """Everything that the scoring passes and the training have stored; empty if no criterion needed any."""
    found: dict[str, Tensor] = {}
    for name in ("statistics", "curvature"):
        path = run.path("saliency", f"{name}.safetensors")
        if artifacts.exists(path):
            found = {**by_group(run.graph(), artifacts.read_tensors(path)), **found}  # the first pass counts the rows
    for name in dict.fromkeys(("dense", run.parent)):
        path = run.path("networks", f"{name}-statistics.safetensors")
        if artifacts.exists(path):
            found |= artifacts.read_tensors(path)
    return found


def saliency_of(run: Run, rule: Rule, graph: Graph, stored: Mapping[str, Tensor]) -> Saliency:
    weights = {name: tensor.detach() for name, tensor in run.network(run.parent).state_dict().items()}
    saliency: Saliency = rule.fn(graph, stored, weights, run.config.score.seed)
    return saliency


def planned(run: Run, graph: Graph, saliency: Saliency, rule: Rule) -> Plan:
    """What a rule keeps of this saliency; all channels, whatever it is, where there is no budget."""
    settings, budget = run.config.budget, channel_budget(run)
    scope = rule.scope if settings.scope == "auto" else settings.scope
    if budget is None:
        return plan_of(graph, {}, criterion=rule.name, scope=scope)
    return allocation.plan(
        graph,
        saliency,
        budget,
        criterion=rule.name,
        scope=scope,
        min_keep=settings.min_keep,
        round_to=settings.round_to,
        max_blocks=settings.max_blocks,
        dense=run.first.graph() if run.base else None,
    )


def our_plan(run: Run, stored: Mapping[str, Tensor]) -> Plan:
    """What the chosen criterion would keep, judged by these statistics."""
    graph, rule = run.graph(), plan_rules(run)["ours"]
    return planned(run, graph, saliency_of(run, rule, graph, stored), rule)


def plan(run: Run) -> None:
    """RUN/plan.json, RUN/plans/CONTROL.json, RUN/masks.safetensors, RUN/saliency/NAME.safetensors and stability.json."""
    config, graph, rules = run.config, run.graph(), plan_rules(run)
    inputs = {
        "graph": graph.sha256(),
        "weights": run.weights_sha256(run.parent),
        "saliency": sums_sha256(run, rules["ours"]) if config.budget.given else [],
        "criteria": {name: rule.name for name, rule in rules.items()},
        "seed": config.score.seed,
        "budget": budget_inputs(run),
    }

    def work() -> None:
        stored = statistics(run)
        for name, rule in rules.items():
            start, saliency = run.start_of(name), Saliency()
            if config.budget.given:
                saliency = saliency_of(start, rule, start.graph(), stored)
                artifacts.write_tensors(run.path("saliency", f"{name}.safetensors"), saliency)
            artifacts.write_bytes(run.plan_path(name), planned(start, start.graph(), saliency, rule).to_json().encode())
        artifacts.write_json(run.path("saliency", "stability.json"), stability(run, stored))
        save_masks(run.path("masks.safetensors"), channel_masks(run.plan("ours")))

    run.stage("plan", inputs, run.path("plan.json"), work)


def cut_inputs(run: Run) -> dict[str, Any]:
    """What the cut networks are made from."""
    return {
        "weights": run.weights_sha256(run.parent),
        "plans": {name: run.plan(name).sha256() for name in networks(run)},
    }


def sums_sha256(run: Run, rule: Rule) -> list[str]:
    """Of the exact sums that a rule reads: what it decides changes with them."""
    stages = {"curvature": CURVATURE_KINDS, "score": (*WEIGHT_KINDS, *INPUT_KINDS, *GateStatistics.nested)}
    used = [stage for stage, kinds in stages.items() if {*rule.needs} & {*kinds}]
    found = [run.manifest.stages[stage].fingerprint for stage in used if stage == "curvature"]
    if "score" in used:
        found.append(artifacts.read_json(run.path("saliency", "pass.json"))["sha256"])
    return found


def stability(run: Run, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """How the plan settles with the number of rows; empty where the criterion reads what is kept over all rows only."""
    rule, graph = plan_rules(run)["ours"], run.graph()
    if not run.config.budget.given or not rule.needs or not {*rule.needs} <= GateStatistics.nested:
        return {}
    final, saliency = run.plan("ours"), saliency_of(run, rule, graph, stored)
    curve = []
    for stride in STRIDES:
        sample = at_stride(stored, stride)
        if 0 < int(sample.get("rows", 0)) < int(stored["rows"]):
            judged = saliency_of(run, rule, graph, sample)
            change = plan_change(planned(run, graph, judged, rule), final)
            correlation = rank_correlation(judged, saliency)
            curve.append({"rows": int(sample["rows"]), "plan_change": change, "rank_correlation": correlation})
    found: dict[str, Any] = {"rows": int(stored["rows"]), "curve": curve}
    if rule.error:
        error = standard_error(graph, stored, *rule.error)
        artifacts.write_tensors(run.path("saliency", "standard_error.safetensors"), error)
        mean = {name: stored[f"{rule.error[0]}/{name}"] / int(stored["rows"]) for name in graph.scored()}
        found["relative_standard_error"] = relative_error(mean, error)
    return found
