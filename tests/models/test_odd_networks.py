"""Odd networks: what a trace lets cut is right, what it refuses has its reason, nothing crashes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.models.graph import Graph
from pipeline.pruning.bench import randomise_
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from pipeline.pruning.verify import compare, output_tensors, verify
from tests.graphs import zeroed
from tests.models.odd_networks import ODD, Odd

NUM_ROWS = 3
TOLERANCE = 1e-9
"""Of the largest output, in float64; rounding over a dozen operations stays near 1e-15, a wrong channel is above 1e-3."""


def prepared(model: nn.Module, example: Tensor | tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A float64 copy with random weights, and random rows."""
    generator = torch.Generator().manual_seed(7)
    model = copy.deepcopy(model).double().eval()
    randomise_(model, generator)
    examples = example if isinstance(example, tuple) else (example,)
    return model, tuple(_rows(one, generator) for one in examples)


def _rows(example: Tensor, generator: torch.Generator) -> Tensor:
    shape = (NUM_ROWS, *example.shape[1:])
    if example.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.randint(int(example.max()) + 1, shape, generator=generator)


def assert_cuts_are_equal(traced: nn.Module, odd: Odd, graph: Graph) -> None:
    """Three unequal random cuts against the masked network and, where that is the same function, plain zeros."""
    model, inputs = prepared(traced, odd.network.example)
    for trial in range(3):
        kept = random_subsets(graph, seed=11, trial=trial)
        plan = planned(graph, kept)
        small = cut(model, plan)
        verify(small, mask(model, plan), inputs).require(TOLERANCE)
        if odd.zeros:
            with torch.no_grad():
                expected = list(output_tensors(torch.func.functional_call(model, zeroed(model, graph, kept), inputs)))
                found = list(output_tensors(small(*inputs)))
            compare(found, expected, rows=NUM_ROWS).require(TOLERANCE)


@pytest.mark.parametrize("name", ODD)
def test_an_odd_network_is_cut_right_or_refused_with_a_reason(name):
    odd = ODD[name]
    net = copy.deepcopy(odd.network.module)
    graph = trace(net, odd.network.example)
    assert_cuts_are_equal(net, odd, graph)  # whatever else it says: never wrong
    free = {group.name for group in graph.groups if group.size > 1}
    why = {frozen.group: f"{frozen.operation}: {frozen.reason}" for frozen in graph.frozen}
    assert free >= set(odd.groups), why
    for group in odd.frozen:
        assert group not in free
        assert odd.reason in why[group]
    assert all(frozen.reason and frozen.where for frozen in graph.frozen)


def test_the_catalogue_is_large_and_every_network_runs_in_float64_with_three_rows():
    assert len(ODD) >= 120
    assert {odd.status for odd in ODD.values()} == {"right", "refused"}
    for name, odd in ODD.items():
        model, inputs = prepared(odd.network.module, odd.network.example)
        with torch.no_grad():
            outputs = list(output_tensors(model(*inputs)))
        assert all(len(output) == NUM_ROWS and bool(output.isfinite().all()) for output in outputs), name
        assert all(float(output.std()) > 0 for output in outputs), name  # a constant would hide every mistake
