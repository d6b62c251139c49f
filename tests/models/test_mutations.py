"""Mutation test: each rule of the tracer is broken on purpose, and no broken rule leads to a wrong cut.

The label propagation and the reference of the trials both run the broken rule, as they would if it had a mistake. Then the
network is refused in part, or tracing stops, or what it lets cut is right by a standard that knows nothing of the mistake:
the dense network with zeros in place of the removed entries, or, where a statistic over channels makes that another
function, the reference that the whole rules give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.graph import Graph
from pipeline.models.trace import RULES, Call, Rule, propagate, tracer
from pipeline.models.trace.labels import Ids, Label
from pipeline.models.trace.rules import barrier, join
from pipeline.models.trace.tracer import Trace
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from pipeline.pruning.verify import compare, output_tensors, verify
from tests.models.odd_networks import ODD, Odd, images, right
from tests.models.test_odd_networks import NUM_ROWS, TOLERANCE, prepared, zeroed

Apply = Callable[[Trace, Call], None]

# --- mutations: what a trace does instead while the rule runs ----------------------------------------------------------

Changed = dict[str, Any]
"""Attributes of the trace while the rule runs."""
Effects = list[str]
"""Grows whenever the mistake has made a difference inside of the rule."""


def silent(*names: str) -> Callable[[Trace, Effects], Changed]:
    """These methods of the trace do nothing."""

    def of(_: Trace, effects: Effects) -> Changed:
        return {name: lambda *args, **kwargs: effects.append("silent") for name in names}

    return of


def relabelled(change: Callable[[dict[int, Ids]], dict[int, Ids] | None]) -> Callable[[Trace, Effects], Changed]:
    """The rule's results get other labels; None: no label at all."""

    def of(trace: Trace, effects: Effects) -> Changed:
        put = trace.put

        def put_other(tensor: Tensor, label: Label | None) -> None:
            axes = change(dict(label.axes)) if label else None
            if label and (axes is None or any((axes[axis] != ids).any() for axis, ids in label.axes.items())):
                effects.append("relabelled")
            put(tensor, replace(label, axes=axes) if label and axes is not None else None)

        return {"put": put_other}

    return of


def rolled(axes: dict[int, Ids]) -> dict[int, Ids]:
    """The last labelled axis, by one position."""
    return {axis: np.roll(ids, axis == max(axes)) for axis, ids in axes.items()}


def turned(axes: dict[int, Ids]) -> dict[int, Ids]:
    """The first labelled axis, from back to front."""
    return {axis: ids[::-1].copy() if axis == min(axes) else ids for axis, ids in axes.items()}


def neighbours(trace: Trace, effects: Effects) -> Changed:
    """Channel i is united with what belongs to channel i - 1."""
    unite = trace.unite

    def unite_others(a: Ids, b: Ids, call: Call) -> None:
        effects.append("united")
        unite(a, np.roll(b, 1), call)

    return {"unite": unite_others}


ELEMENTWISE = "is elementwise"
MUTATIONS: dict[str, Callable[[Trace, Effects], Changed]] = {
    "unites nothing": silent("unite"),
    "unites neighbours": neighbours,
    "rolls the labels": relabelled(rolled),
    "turns the labels round": relabelled(turned),
    "drops the labels": relabelled(lambda axes: None),
    "freezes nothing": silent("freeze", "freeze_as"),
    "tells of no statistic": silent("mix"),
    ELEMENTWISE: lambda _, effects: effects.append("elementwise") or {},
}
FALLBACKS = {"join": join, "barrier": barrier}
"""Rules of operations without an entry: those that torch tags as pointwise, and all others."""


def name_of(rule: Rule) -> str:
    return rule.apply.__name__


NAMES = sorted({name_of(rule) for rule in RULES.values()} | {*FALLBACKS})


@contextmanager
def broken(name: str, mutation: str) -> Iterator[Effects]:
    """Inside, the rule has the mistake, for all operations that go by it."""
    effects: Effects = []

    def mistaken(apply: Apply) -> Apply:
        def run(trace: Trace, call: Call) -> None:
            changed = MUTATIONS[mutation](trace, effects)
            vars(trace).update(changed)
            try:
                (join if mutation == ELEMENTWISE else apply)(trace, call)
            finally:
                for attribute in changed:
                    del vars(trace)[attribute]

        return run

    with ruled(lambda apply: mistaken(apply) if apply.__name__ == name else apply, elementwise=mutation == ELEMENTWISE):
        yield effects


@contextmanager
def ruled(by: Callable[[Apply], Apply], *, elementwise: bool = False) -> Iterator[None]:
    """Inside, each rule is what `by` makes of it; if that is elementwise, the reference takes it for that, too."""

    def changed(rule: Rule) -> Rule:
        apply = by(rule.apply)
        return Rule(apply, "join") if elementwise and apply is not rule.apply else replace(rule, apply=apply)

    table = {operation: changed(rule) for operation, rule in RULES.items()}
    fallbacks = {name: by(apply) for name, apply in FALLBACKS.items()}
    with mock.patch.dict(RULES, table), mock.patch.multiple(tracer, **fallbacks):
        yield


NETWORKS: dict[str, Odd] = ODD | {
    "pool to one pixel in channels_last memory": right(
        images(lambda m, x: F.adaptive_avg_pool2d(x.contiguous(memory_format=torch.channels_last), 1))
    ),
    "pool a sequence": right(images(lambda m, x: F.avg_pool1d(x.flatten(2), 2), b=nn.Conv1d(12, 6, 1))),
    "pool a volume": right(images(lambda m, x: F.max_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0])),
    "fill": right(images(lambda m, x: x + torch.zeros_like(x).fill_(0.5))),
}


# --- verdicts ---------------------------------------------------------------------------------------------------------


@cache
def users() -> dict[str, list[str]]:
    """Rule -> networks of the catalogue that run it."""
    found: dict[str, list[str]] = {name: [] for name in NAMES}
    for network, odd in NETWORKS.items():
        ran: set[str] = set()

        def noted(apply: Apply, ran: set[str] = ran) -> Apply:
            def note(trace: Trace, call: Call) -> None:
                ran.add(apply.__name__)
                apply(trace, call)

            return note

        with ruled(noted):
            propagate(copy.deepcopy(odd.network.module), odd.network.example)
        for name in ran:
            found[name].append(network)
    return found


def free_channels(graph: Graph) -> set[tuple[str, int, int]]:
    """(tensor, dimension, entry) of all that can be cut."""
    return {(m.tensor, m.dim, i) for g in graph.groups if g.size > 1 for m in g.members for i in m.index_CK.flatten().tolist()}


@cache
def whole(network: str) -> Graph:
    """What the whole rules say."""
    return trace(copy.deepcopy(NETWORKS[network].network.module), NETWORKS[network].network.example)


def verdict(name: str, mutation: str, network: str) -> str:
    """What the mistake comes to.

    - "idle": it makes no difference inside of the rule. "same": none to the groups.
    - "refused": some channels that could be cut stay. "stopped": tracing raises an error.
    - "right": other groups, but every cut is right.
    - "wrong": a cut is not, and nothing has told.
    """
    odd = NETWORKS[network]
    net = copy.deepcopy(odd.network.module)
    try:
        with broken(name, mutation) as effects:
            graph = trace(net, odd.network.example)
    except (ValueError, AssertionError, IndexError) as error:
        return f"stopped: {type(error).__name__}"
    if not effects:
        return "idle"
    if (graph.groups, graph.sizes) == (whole(network).groups, whole(network).sizes):
        return "same"
    model, inputs = prepared(net, odd.network.example)
    for trial in range(2):
        kept = random_subsets(graph, seed=11, trial=trial)
        plan = planned(graph, kept)
        try:
            small = cut(model, plan)
            if odd.zeros and network not in SEES_ZEROS:
                with torch.no_grad():
                    expected = list(output_tensors(torch.func.functional_call(model, zeroed(model, graph, kept), inputs)))
                    found = list(output_tensors(small(*inputs)))
                compare(found, expected, rows=NUM_ROWS).require(TOLERANCE)
            else:
                verify(small, mask(model, plan), inputs).require(TOLERANCE)
        except (RuntimeError, ValueError) as error:
            return f"wrong: {error}"
    return "refused" if free_channels(whole(network)) - free_channels(graph) else "right"


SEES_ZEROS = {"item"}
"""Networks that are refused as a whole, so that the catalogue need not say that zeros are another function there."""
