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
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from pipeline.models.graph import Graph
from pipeline.models.trace import RULES, Call, Rule, propagate, tracer
from pipeline.models.trace.labels import Label
from pipeline.models.trace.rules import barrier, join
from pipeline.models.trace.tracer import Trace
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from pipeline.pruning.verify import compare, output_tensors, verify
from tests.models.odd_networks import ODD
from tests.models.test_odd_networks import NUM_ROWS, TOLERANCE, prepared, zeroed

Apply = Callable[[Trace, Call], None]

# --- mutations: what a trace does instead while the rule runs ----------------------------------------------------------


def nothing(*_: Any, **__: Any) -> None:
    """Does nothing."""


def put_other(change: Callable[[Label], Label | None]) -> Callable[[Trace], dict[str, Any]]:
    """The rule's results get another label."""

    def of(trace: Trace) -> dict[str, Any]:
        put = trace.put
        return {"put": lambda tensor, label: put(tensor, label and change(label))}

    return of


def rolled(label: Label) -> Label:
    """The last labelled axis, by one position."""
    axes = dict(label.axes)
    if axes:
        axes[max(axes)] = np.roll(axes[max(axes)], 1)
    return Label(axes, label.note, label.source)


def turned(label: Label) -> Label:
    """The first labelled axis, from back to front."""
    axes = dict(label.axes)
    if axes:
        axes[min(axes)] = axes[min(axes)][::-1].copy()
    return Label(axes, label.note, label.source)


def shifted_unions(trace: Trace) -> dict[str, Any]:
    unite = trace.unite
    return {"unite": lambda a, b, call: unite(a, np.roll(b, 1), call)}


MUTATIONS: dict[str, Callable[[Trace], dict[str, Any]]] = {
    "unites nothing": lambda trace: {"unite": nothing},
    "unites neighbours": shifted_unions,
    "rolls the labels": put_other(rolled),
    "turns the labels round": put_other(turned),
    "drops the labels": put_other(lambda label: None),
    "freezes nothing": lambda trace: {"freeze": nothing, "freeze_as": nothing},
    "tells of no statistic": lambda trace: {"mix": nothing},
    "is elementwise": lambda trace: {},
}
"""Attributes of the trace while the rule runs."""


def name_of(rule: Rule) -> str:
    return rule.apply.__name__


@contextmanager
def broken(name: str, mutation: str) -> Iterator[None]:
    """Inside, the rule has the mistake, for all operations that go by it."""

    def apply_with(apply: Apply) -> Apply:
        def apply_broken(trace: Trace, call: Call) -> None:
            changed = MUTATIONS[mutation](trace)
            vars(trace).update(changed)
            try:
                apply(trace, call)
            finally:
                for attribute in changed:
                    del vars(trace)[attribute]

        return apply_broken

    def changed(rule: Rule) -> Rule:
        return Rule(join, "join") if mutation == "is elementwise" else Rule(apply_with(rule.apply), rule.kind, rule.resize)

    rules = {operation: changed(rule) for operation, rule in RULES.items() if name_of(rule) == name}
    other = {f"{name}": join if mutation == "is elementwise" else apply_with(getattr(tracer, name))} if name in FALLBACKS else {}
    with mock.patch.dict(RULES, rules), mock.patch.multiple(tracer, **other) if other else mock.patch.dict({}):
        yield


FALLBACKS = {"join": join, "barrier": barrier}
"""Rules by which operations without an entry go: those tagged as pointwise, and all others."""
NAMES = sorted({name_of(rule) for rule in RULES.values()} | {*FALLBACKS})


# --- verdicts ---------------------------------------------------------------------------------------------------------


@cache
def users() -> dict[str, list[str]]:
    """Rule -> networks of the catalogue that run it."""
    found: dict[str, list[str]] = {name: [] for name in NAMES}
    for network, odd in ODD.items():
        ran: set[str] = set()

        def noted(apply: Apply, ran: set[str] = ran) -> Apply:
            def note(trace: Trace, call: Call) -> None:
                ran.add(apply.__name__)
                apply(trace, call)

            return note

        rules = {operation: Rule(noted(rule.apply), rule.kind, rule.resize) for operation, rule in RULES.items()}
        with mock.patch.dict(RULES, rules), mock.patch.multiple(tracer, join=noted(join), barrier=noted(barrier)):
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
    return trace(copy.deepcopy(ODD[network].network.module), ODD[network].network.example)


def verdict(name: str, mutation: str, network: str) -> str:
    odd = ODD[network]
    net = copy.deepcopy(odd.network.module)
    try:
        with broken(name, mutation):
            graph = trace(net, odd.network.example)
    except Exception as error:
        return f"stopped: {type(error).__name__}"
    if (graph.groups, graph.sizes) == (whole(network).groups, whole(network).sizes):
        return "same"
    model, inputs = prepared(net, odd.network.example)
    for trial in range(2):
        kept = random_subsets(graph, seed=11, trial=trial)
        plan = planned(graph, kept)
        try:
            small = cut(model, plan)
            if odd.zeros:
                with torch.no_grad():
                    expected = list(output_tensors(torch.func.functional_call(model, zeroed(model, graph, kept), inputs)))
                    found = list(output_tensors(small(*inputs)))
                compare(found, expected, rows=NUM_ROWS).require(TOLERANCE)
            else:
                verify(small, mask(model, plan), inputs).require(TOLERANCE)
        except Exception as error:
            return f"wrong: {type(error).__name__}: {str(error)[:200]}"
    return "refused" if free_channels(whole(network)) - free_channels(graph) else "right"
