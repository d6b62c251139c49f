"""A small network with what makes surgery hard, and its channel groups written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.models.graph import Contraction, Graph, Group, Member, Site
from tests.graphs import index

INPUT_SHAPE = (1, 3, 4, 4)


class Mixed(nn.Module):
    """Residual stream, depthwise convolution, squeeze-and-excite, grouped convolution, concatenation, flattening."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.a = nn.Conv2d(width, 12, 1, bias=False)
        self.bn_a = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.reduce = nn.Conv2d(12, 6, 1)
        self.expand = nn.Conv2d(6, 12, 1)
        self.b = nn.Conv2d(12, width, 1)
        self.e = nn.Conv2d(width, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.f = nn.Conv2d(16, width, 1)
        self.h = nn.Conv2d(width, 4, 1)
        self.fc = nn.Linear((width + 4) * 4, 5)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        stream = self.bn(self.stem(images_NCHW)).relu()
        inside = self.depthwise(self.bn_a(self.a(stream)).relu())
        gate = self.expand(self.reduce(inside.mean((2, 3), keepdim=True)).relu()).sigmoid()
        stream = stream + self.b(inside * gate)
        stream = stream + self.f(self.grouped(self.e(stream).relu()).relu())
        both = torch.cat([stream, self.h(stream).sigmoid()], dim=1)
        return self.fc(nn.functional.avg_pool2d(both, 2).flatten(1))


def mixed(width: int = 8) -> nn.Module:
    """`Mixed` with weights that hide nothing."""
    torch.manual_seed(0)
    model = Mixed(width)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


def mixed_graph() -> Graph:
    """stem: the stream. a: inside the block. reduce. e: the 4 conv groups, 4 entries each. h: the end of the cat."""
    groups = (
        _group("stem", 8, [_out("stem", 8), *_norm("bn", 8), _in("a", 8), *_layer("b", 8), _in("e", 8), *_layer("f", 8),
                           _in("h", 8), Member("fc.weight", 1, index(8, 4), "in")],
               [Site("a", 1, index(8)), Site("e", 1, index(8)), Site("h", 1, index(8)), Site("fc", -1, index(8, 4))]),
        _group("a", 12, [_out("a", 12), *_norm("bn_a", 12), *_layer("depthwise", 12), _in("reduce", 12),
                         *_layer("expand", 12), _in("b", 12)],
               [Site("reduce", 1, index(12)), Site("b", 1, index(12))]),
        _group("reduce", 6, [*_layer("reduce", 6), _in("expand", 6)], [Site("expand", 1, index(6))]),
        _group("e", 4, [*_layer("e", 4, 4), *_layer("grouped", 4, 4), _in("f", 4, 4)], [Site("f", 1, index(4, 4))]),
        _group("h", 4, [*_layer("h", 4), Member("fc.weight", 1, index(4, 4, start=32), "in")],
               [Site("fc", -1, index(4, 4, start=32))]),
    )  # fmt: skip
    tensors = Mixed().state_dict()
    positions = {"reduce": 1, "expand": 1, "fc": 1}
    weights = [name for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() > 1]
    contractions = tuple(Contraction(name, positions.get(name.split(".")[0], 16)) for name in weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Graph(groups, (), contractions, shapes, tuple(n for n, _ in Mixed().named_parameters()), INPUT_SHAPE)


def _group(name: str, size: int, members: list[Member], consumers: list[Site]) -> Group:
    return Group(name, size, tuple(members), tuple(consumers))


def _out(layer: str, size: int, width: int = 1) -> Member:
    return Member(f"{layer}.weight", 0, index(size, width), "out")


def _in(layer: str, size: int, width: int = 1) -> Member:
    return Member(f"{layer}.weight", 1, index(size, width), "in")


def _layer(layer: str, size: int, width: int = 1) -> list[Member]:
    return [_out(layer, size, width), Member(f"{layer}.bias", 0, index(size, width), "affine")]


def _norm(layer: str, size: int) -> list[Member]:
    return [Member(f"{layer}.{t}", 0, index(size), "affine") for t in ("weight", "bias", "running_mean", "running_var")]
