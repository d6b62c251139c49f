"""Costs: counted from the graph, equal to what a cut network has and does."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.models.costs import Costs, count
from pipeline.models.graph import Contraction, Graph, Group, Member
from pipeline.pruning.plan import planned
from pipeline.pruning.surgery import cut
from tests.graphs import Residual, chain, index, residual_graph


def test_costs_of_a_chain_counted_by_hand():
    # fc0: 3*4 + 4, fc1: 4*2 + 2
    assert count(chain(3, 4, 2), {}) == Costs(params=26, macs=20)
    # fc0: 3*1 + 1, fc1: 1*2 + 2
    assert count(chain(3, 4, 2), {"fc0": torch.tensor([2])}) == Costs(params=8, macs=5)


def test_costs_of_a_residual_network_counted_by_hand():
    graph = residual_graph()
    # conv 216, bn 16, a 864 + 12, bn_a 24, b 96 + 8, depthwise 72 + 8, fc 160 + 5
    assert count(graph, {}) == Costs(params=1481, macs=216 * 16 + 864 * 16 + 96 * 16 + 72 * 4 + 160)
    kept = {"conv": torch.arange(5), "a": torch.tensor([0, 2, 3, 5, 7, 8, 11])}
    # conv 135, bn 10, a 315 + 7, bn_a 14, b 35 + 5, depthwise 45 + 5, fc 100 + 5
    assert count(graph, kept) == Costs(params=676, macs=135 * 16 + 315 * 16 + 35 * 16 + 45 * 4 + 100)


def test_a_group_on_both_sides_of_one_weight_counts_its_square():
    members = (Member("w", 0, index(4), "out"), Member("w", 1, index(4), "in"))
    graph = Graph((Group("g", 4, members, ()),), (), (Contraction("w", 10),), {"w": (4, 5)}, ("w",), (1, 4))
    assert count(graph, {"g": torch.tensor([0, 3])}) == Costs(params=2 * 3, macs=60)


def test_a_group_that_owns_two_parts_of_one_dimension_takes_both():
    members = (Member("w", 1, index(2), "in"), Member("w", 1, index(2, start=3), "in"))
    graph = Graph((Group("g", 2, members, ()),), (), (), {"w": (3, 5)}, ("w",), (1, 5))
    assert count(graph, {"g": torch.tensor([1])}).params == 3 * 3


def test_tied_parameters_count_once_but_multiply_twice_and_buffers_never():
    shapes = {"embed.weight": (6, 4), "head.weight": (6, 4), "norm.running_mean": (4,)}
    uses = (Contraction("embed.weight", 7), Contraction("embed.weight", 3))
    graph = Graph((), (), uses, shapes, ("embed.weight",), (1, 4))
    assert count(graph, {}) == Costs(params=24, macs=240)


def test_none_keeps_a_group_whole():
    graph = residual_graph()
    assert count(graph, {"a": None}) == count(graph, {})


@pytest.mark.parametrize("indices", [[0, 0], [4], [-1]])
def test_indices_that_are_no_subset_are_refused(indices):
    with pytest.raises(ValueError, match=r"kept\['fc0'\] must be distinct channel indices from 0 to 3"):
        count(chain(3, 4, 2), {"fc0": torch.tensor(indices)})


def test_an_unknown_group_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"no group 'fc7'.*fc0"):
        count(chain(3, 4, 2), {"fc7": None})


def channels(size: int) -> st.SearchStrategy[set[int]]:
    return st.sets(st.integers(0, size - 1), min_size=1)


@given(stream=channels(8), inside=channels(12))
def test_a_cut_network_has_and_does_what_was_counted(stream, inside):
    graph = residual_graph()
    small = cut(Residual().eval(), planned(graph, {"conv": stream, "a": inside}))
    costs = count(graph, {"conv": torch.tensor(sorted(stream)), "a": torch.tensor(sorted(inside))})
    assert costs.params == sum(parameter.numel() for parameter in small.parameters())
    assert costs.macs == multiplied(small, torch.zeros(1, 3, 4, 4))


def multiplied(model: nn.Module, images_NCHW: Tensor) -> int:
    """Multiply-accumulates of a forward pass, counted at the modules that do them."""
    total = 0

    def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += module.weight.numel() * (output[0, 0].numel() if output.dim() == 4 else 1)

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(images_NCHW)
    return total
