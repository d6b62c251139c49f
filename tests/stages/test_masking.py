"""Masks on a network: what is tied, what runs the other way round, what has nothing to be judged by."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from pipeline.config import MasksConfig
from pipeline.models.graph import Contraction, Graph
from pipeline.pruning.masks import masked
from pipeline.saliency.criteria import rule
from pipeline.stages.masking import _maskable


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight


def test_a_tied_weight_is_masked_under_all_its_names_and_the_network_stays():
    network = Tied()
    state = masked(network, {"a.weight": torch.zeros(3, 3, dtype=torch.bool)}).state_dict()
    assert not state["a.weight"].any()
    assert not state["b.weight"].any()
    again = Tied()
    again.load_state_dict(state)
    assert not again.a.weight.any()
    assert network.a.weight.all()


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.bare = nn.Parameter(torch.ones(4, 16))


def whole(**settings: object) -> dict[str, str]:
    """Name -> why it stays whole, where statistics of `conv` and `depthwise` are stored."""
    network = Parts()
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    names = ["conv.weight", "depthwise.weight", "up.weight", "bare"]
    graph = Graph((), (), tuple(Contraction(name, 1) for name in names), shapes, tuple(shapes), (1, 8, 8, 8))
    masks = MasksConfig(**settings)
    run = SimpleNamespace(config=SimpleNamespace(masks=masks), network=lambda name: network)
    stored = {f"input_square/{name}": torch.ones(8) for name in names[:2]}
    return _maskable(run, graph, rule("weights", *masks.criterion), stored)[1]


def test_what_cannot_be_masked_stays_whole_with_its_reason():
    assert whole(pattern="unstructured", keep=0.5, criterion="magnitude") == {}
    assert whole(pattern="2:4", criterion="magnitude") == {
        "depthwise.weight": "its shape [8, 1, 3, 3] has no 2:4 along the inputs",
        "up.weight": "a transposed convolution has its inputs in the first dimension",
    }
    assert whole(pattern="unstructured", keep=0.1, criterion="wanda") == {
        "depthwise.weight": "0.1 of the 9 weights of an output is less than one",
        "up.weight": "a transposed convolution has its inputs in the first dimension",
        "bare": "no input_square is recorded of it",
    }
    assert set(whole(pattern="unstructured", keep=0.5, criterion="magnitude", only="conv*")) == {
        "depthwise.weight",
        "up.weight",
        "bare",
    }
