"""The stage that masks single weights of the dense network, from the statistics that the channels were planned with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from pipeline import artifacts
from pipeline.models.graph import Graph
from pipeline.pruning.masks import masked, save_masks
from pipeline.pruning.sparsity import fits, kept_fraction, weight_masks
from pipeline.run import Run
from pipeline.saliency.criteria import Rule
from pipeline.stages.planning import mask_rule, statistics, sums_sha256


class Scores(Mapping[str, Tensor]):
    """Scores of weights by name, each worked out when it is looked at: in memory is one layer at a time."""

    def __init__(
        self,
        rule: Rule,
        names: list[str],
        stored: Mapping[str, Tensor],
        weights: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        self.rule, self.names, self.stored, self.weights, self.seed = rule, names, stored, weights, seed

    def __getitem__(self, name: str) -> Tensor:
        score: Tensor = self.rule.fn(name, self.stored, self.weights, self.seed)
        return score

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_masks(run: Run) -> None:
    """A pattern that does not exist, or a fraction that it does not go with, shows before everything."""
    if run.config.masks.pattern is not None:
        kept_fraction(run.config.masks.pattern, run.config.masks.keep)


def require_maskable(run: Run) -> None:
    """Masks of nothing show before the scoring."""
    rule = mask_rule(run)
    if rule is None:
        return
    names, whole = _maskable(run, run.graph(), rule)
    if not names:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(whole.items())[:3])
        raise ValueError(
            f"masks.pattern {run.config.masks.pattern}: no weight can be masked. The first reasons: {reasons}."
        )


def mask_weights(run: Run) -> None:
    """RUN/weight_masks.safetensors (bit-packed), RUN/weight_masks.json, RUN/networks/masked.safetensors."""
    settings, rule = run.config.masks, mask_rule(run)
    if rule is None or settings.pattern is None:
        return
    graph, pattern = run.graph(), settings.pattern
    inputs = {
        "graph": graph.sha256(),
        "weights": run.weights_sha256("dense"),
        "saliency": sums_sha256(run, rule),
        "criterion": rule.name,
        "scope": _scope(run, rule),
        "seed": run.config.score.seed,
        "masks": settings.model_dump(mode="json"),
    }

    def work() -> None:
        network, stored = run.network("dense"), statistics(run)
        names, whole = _maskable(run, graph, rule, stored)
        scores = Scores(rule, names, stored, network.state_dict(), run.config.score.seed)
        masks = weight_masks(scores, pattern=pattern, keep=settings.keep, scope=_scope(run, rule))
        sha256 = save_masks(run.path("weight_masks.safetensors"), masks)
        kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        about: dict[str, Any] = {
            "pattern": pattern,
            "criterion": rule.name,
            "scope": _scope(run, rule),
            "sha256": sha256,
        }
        about |= {"kept": kept, "weights": total, "whole": whole}
        run.save_network("masked", masked(network, masks).state_dict())
        artifacts.write_json(run.path("weight_masks.json"), about)

    run.stage("mask", inputs, run.path("weight_masks.safetensors"), work)


def _scope(run: Run, rule: Rule) -> str:
    return rule.scope if run.config.masks.scope == "auto" else run.config.masks.scope


def _maskable(
    run: Run, graph: Graph, rule: Rule, stored: Mapping[str, Tensor] | None = None
) -> tuple[list[str], dict[str, str]]:
    """Weights that are multiplied and can be masked; of the others, why they stay whole.

    Args:
        stored: statistics, of which the rule must have its own; None: not there yet.
    """
    modules = dict(run.network("dense").named_modules())
    names = list(dict.fromkeys(c.tensor for c in graph.contractions if c.tensor in graph.shapes))
    reasons = {name: _why_whole(run, rule, name, graph.shapes[name], modules, stored) for name in names}
    return [name for name in names if not reasons[name]], {name: why for name, why in reasons.items() if why}


def _why_whole(
    run: Run,
    rule: Rule,
    name: str,
    shape: tuple[int, ...],
    modules: Mapping[str, nn.Module],
    stored: Mapping[str, Tensor] | None,
) -> str:
    settings, scope = run.config.masks, _scope(run, rule)
    assert settings.pattern is not None
    fraction, structured = kept_fraction(settings.pattern, settings.keep), settings.pattern != "unstructured"
    missing = [kind for kind in rule.needs if kind != "rows" and stored is not None and f"{kind}/{name}" not in stored]
    row_length = torch.Size(shape[1:]).numel()
    if not fnmatchcase(name, settings.only):
        return f"masks.only is {settings.only}"
    if not fits(shape, settings.pattern):
        return f"its shape {list(shape)} has no {settings.pattern} along the inputs"
    if (structured or scope == "row") and isinstance(modules.get(name.rpartition(".")[0]), _ConvTransposeNd):
        return "a transposed convolution has its inputs in the first dimension"
    if scope == "row" and not structured and int(fraction * row_length) == 0:
        return f"{float(fraction):g} of the {row_length} weights of an output is less than one"
    return f"no {', '.join(missing)} is recorded of it" if missing else ""
