"""Mutation test: each rule of the tracer is broken on purpose, and no broken rule leads to a wrong cut.

The label propagation and the reference of the trials both run the broken rule, as they would if it had a mistake. Then the
network is refused in part, or tracing stops, or what it lets cut is right by a standard that knows nothing of the mistake:
the dense network with zeros in place of the removed entries, or, where a statistic over channels makes that another
function, the reference that the whole rules give.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
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

from pipeline.models.graph import Graph, Group
from pipeline.models.trace import RULES, Call, Rule, propagate, tracer
from pipeline.models.trace.labels import Ids, Label
from pipeline.models.trace.rules import barrier, join
from pipeline.models.trace.tracer import Trace
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from pipeline.pruning.verify import compare, output_tensors, verify
from tests.graphs import zeroed
from tests.models.odd_networks import ODD, Odd, images, right
from tests.models.test_odd_networks import NUM_ROWS, TOLERANCE, prepared

Apply = Callable[[Trace, Call], None]
Kept = dict[str, tuple[int, ...]]

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
    "stretch a sequence": right(
        images(lambda m, x: F.interpolate(x.flatten(2), scale_factor=2), b=nn.Conv1d(12, 6, 1))
    ),
    "pool a volume": right(images(lambda m, x: F.max_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0])),
    "fill": right(images(lambda m, x: x + torch.zeros_like(x).fill_(0.5))),
}


# --- verdicts ---------------------------------------------------------------------------------------------------------


@cache
def users() -> dict[str, dict[str, bool]]:
    """Rule -> networks of the catalogue that run it -> does it take a statistic over channels there?"""
    found: dict[str, dict[str, bool]] = {name: {} for name in NAMES}
    for network, odd in NETWORKS.items():

        def noted(apply: Apply, network: str = network) -> Apply:
            def note(trace: Trace, call: Call) -> None:
                apply(trace, call)
                found[apply.__name__][network] = trace.mixes or found[apply.__name__].get(network, False)

            return note

        with ruled(noted):
            propagate(copy.deepcopy(odd.network.module), odd.network.example)
    return found


Entries = set[tuple[str, int, int]]
"""(tensor, dimension, entry)"""


def entries(group: Group, channels: Iterable[int]) -> Entries:
    return {(m.tensor, m.dim, entry) for m in group.members for entry in m.index_CK[list(channels)].flatten().tolist()}


def free_entries(graph: Graph) -> Entries:
    return {entry for group in graph.groups if group.size > 1 for entry in entries(group, range(group.size))}


def are_whole_channels(graph: Graph, removed: Entries) -> bool:
    channels = [entries(group, [c]) for group in graph.groups for c in range(group.size)]
    return removed == {entry for channel in channels if channel <= removed for entry in channel}


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
        try:
            if not is_right(model, inputs, graph, random_subsets(graph, seed=11, trial=trial), network):
                return "wrong"
        except (RuntimeError, ValueError) as error:
            return f"wrong: {error}"
    return "refused" if free_entries(whole(network)) - free_entries(graph) else "right"


def is_right(model: nn.Module, inputs: tuple[Tensor, ...], graph: Graph, kept: Kept, network: str) -> bool:
    """Is the cut network the dense one with zeros? Or, where a statistic sees zeros, what the whole rules say it is?

    Their reference follows the plan: it alone would not see that the scale of one channel is kept with the values of another.
    So the plan has to be one that they allow, too.
    """
    plan = planned(graph, kept)
    small = cut(model, plan)
    with torch.no_grad():
        found = list(output_tensors(small(*inputs)))
        zeros = list(output_tensors(torch.func.functional_call(model, zeroed(model, graph, kept), inputs)))
    if compare(found, zeros, rows=NUM_ROWS).max_rel <= TOLERANCE:
        return True
    removed = {entry for group in plan.groups for entry in entries(graph.group(group.name), group.removed)}
    return (
        not NETWORKS[network].zeros
        and are_whole_channels(whole(network), removed)
        and verify(small, mask(model, plan), inputs).max_rel <= TOLERANCE
    )


# --- mistakes that cut and reference could make alike ------------------------------------------------------------------

RELABELLED = ("rolls the labels", "turns the labels round")
ALIKE = [
    *(
        (name, mutation, network)
        for name, network in [
            ("along", "softmax over channels"),
            ("batch_norm", "batch norm of the batch over channels"),
            ("group_norm", "group norm of one group"),
            ("layer_norm", "layer norm"),
            ("reduce", "broadcast over a new axis"),
            ("weight_norm", "weight_norm"),
        ]
        for mutation in RELABELLED
    ),
    ("layer_norm", "unites neighbours", "layer norm"),
    ("group_norm", "unites neighbours", "group norm of one group"),
    ("weight_norm", "unites neighbours", "weight_norm"),
    ("convolution", "turns the labels round", "topk of channels"),
]
"""(rule, mutation, network): the reference takes statistics where labels say so. The last: ReLUs that never open."""


@pytest.mark.parametrize(("name", "mutation", "network"), ALIKE)
def test_a_mistake_that_both_sides_follow_is_seen(name, mutation, network):
    assert not verdict(name, mutation, network).startswith("wrong")


# --- all others -------------------------------------------------------------------------------------------------------

HARMLESS: dict[str, tuple[str, set[str]]] = {
    "freezes nothing": (
        "what comes out has no labels, so the readers stay, or the trials find what was not frozen",
        {"along_one_axis", "attention", "barrier", "batch_norm", "bilinear", "convolution", "copy", "join", "layer_norm",
         "matrix_product", "part", "picked", "position", "product_of_parameters", "reshape", "slice_", "window1d", "window2d",
         "window3d"},
    ),
    ELEMENTWISE: (
        "the rule is a join that freezes more, or the labels of its one operand pass as they do in a join",
        {"along_one_axis", "as_strided", "fill", "fresh", "join", "like", "position", "reads_values", "same",
         "window1d", "window3d"},
    ),
    "drops the labels": (
        "it works in place, or the channels are frozen anyway",
        {"as_strided", "barrier", "fill", "position"},
    ),
    "unites nothing": ("the same channels are united where they are read", {"col2im", "picked", "slice_"}),
    "unites neighbours": ("what meets there is frozen", {"picked"}),
    "turns the labels round": ("of a tensor that is the same everywhere", {"fill", "like"}),
    "tells of no statistic": ("the channels are frozen", {"position"}),
}  # fmt: skip
"""Mutation -> why it changes nothing, or nothing that is wrong, and the rules for which that is so."""
AS_IN_A_NORM = {("reads_values", ELEMENTWISE, "item")}
"""(rule, mutation, network) that are cut although the whole rules refuse, and rightly: the mean is one of the kept channels in both."""
CASES = [(name, mutation) for name in NAMES for mutation in MUTATIONS]


@pytest.mark.parametrize("name", NAMES)
def test_no_mistake_in_a_rule_leads_to_a_wrong_cut(name):
    """One network for each mutation."""
    for i, mutation in enumerate(MUTATIONS):
        networks = list(users()[name])
        for network in networks[i * len(networks) // len(MUTATIONS) :][:1]:
            assert not verdict(name, mutation, network).startswith("wrong"), (mutation, network)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mutation"), CASES)
def test_a_mistake_is_found_on_some_network_or_harmless(name, mutation):
    networks = [network for network in users()[name] if (name, mutation, network) not in AS_IN_A_NORM]
    verdicts = {network: verdict(name, mutation, network) for network in networks[:: -(-len(networks) // 12) or 1]}
    assert not {network: found for network, found in verdicts.items() if found.startswith("wrong")}
    found = any(one == "refused" or one.startswith("stopped") for one in verdicts.values())
    harmless = name in HARMLESS.get(mutation, ("", ()))[1] or set(verdicts.values()) <= {"idle"}
    assert found != harmless, verdicts
