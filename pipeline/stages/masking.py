"""The stage that masks single weights of the dense network, from the statistics that the channels were planned with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from pipeline import artifacts
from pipeline.models.graph import Graph
from pipeline.pruning.masks import save_masks
from pipeline.pruning.sparsity import fits, kept_fraction, weight_masks
from pipeline.run import Run
from pipeline.saliency.criteria import Rule
from pipeline.stages.planning import mask_rule, statistics, sums_sha256


class Scores(Mapping[str, Tensor]):
    """Scores of weights by name, each worked out when it is looked at: in memory is one layer at a time."""

    def __init__(
        self, rule: Rule, names: list[str], stored: Mapping[str, Tensor], weights: Mapping[str, Tensor], seed: int
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
    """A pattern that does not exist, or a fraction that it does not go with, shows before the scoring."""
    if run.config.masks.pattern is not None:
        kept_fraction(run.config.masks.pattern, run.config.masks.keep)


def mask_weights(run: Run) -> None:
    """RUN/weight_masks.safetensors (bit-packed), RUN/weight_masks.json, RUN/networks/masked.safetensors."""
    settings, rule = run.config.masks, mask_rule(run)
    if rule is None or settings.pattern is None:
        return
    graph, pattern = run.graph(), settings.pattern
    scope = rule.scope if settings.scope == "auto" else settings.scope
    inputs = {
        "graph": graph.sha256(),
        "weights": run.weights_sha256("dense"),
        "saliency": sums_sha256(run, rule),
        "criterion": rule.name,
        "scope": scope,
        "seed": run.config.score.seed,
        "masks": settings.model_dump(mode="json"),
    }

    def work() -> None:
        weights = run.network("dense").state_dict()
        names, whole = _maskable(graph, weights, pattern, settings.only)
        scores = Scores(rule, names, statistics(run), weights, run.config.score.seed)
        masks = weight_masks(scores, pattern=pattern, keep=settings.keep, scope=scope)
        sha256 = save_masks(run.path("weight_masks.safetensors"), masks)
        kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        about: dict[str, Any] = {"pattern": pattern, "criterion": rule.name, "scope": scope, "sha256": sha256}
        about |= {"kept": kept, "weights": total, "whole": whole}
        run.save_network("masked", masked(weights, masks))
        artifacts.write_json(run.path("weight_masks.json"), about)

    run.stage("mask", inputs, run.path("weight_masks.safetensors"), work)


def _maskable(graph: Graph, weights: Mapping[str, Tensor], pattern: str, only: str) -> tuple[list[str], dict[str, str]]:
    """Weights that are multiplied and whose shape has the pattern; of the others, why they stay whole."""
    whole = {}
    names = list(dict.fromkeys(c.tensor for c in graph.contractions if c.tensor in weights))
    for name in names:
        if not fnmatchcase(name, only):
            whole[name] = f"masks.only is {only}"
        elif not fits(weights[name].shape, pattern):
            whole[name] = f"its shape {list(weights[name].shape)} has no {pattern} along the inputs"
    return [name for name in names if name not in whole], whole


def masked(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with zeros where a mask is False."""
    return {name: torch.where(masks[name], w, 0) if name in masks else w for name, w in weights.items()}
