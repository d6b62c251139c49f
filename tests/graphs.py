"""Small graphs written by hand, so that tests of what reads a graph do not depend on what traces one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pipeline.models.graph import Contraction, Graph, Group, Member, Site


def index(size: int, width: int = 1, start: int = 0) -> Tensor:
    """[size, width]: channel c owns the `width` entries from start + c * width."""
    return (start + torch.arange(size * width)).reshape(size, width)


def chain(*widths: int) -> Graph:
    """Linear layers fc0, fc1, ... between these widths, with biases; one group for each width between two layers."""
    layers = [f"fc{i}" for i in range(len(widths) - 1)]
    shapes: dict[str, tuple[int, ...]] = {}
    for i, layer in enumerate(layers):
        shapes |= {f"{layer}.weight": (widths[i + 1], widths[i]), f"{layer}.bias": (widths[i + 1],)}
    groups = []
    for layer, follower, size in zip(layers, layers[1:], widths[1:], strict=False):
        members = (
            Member(f"{layer}.weight", 0, index(size), "out"),
            Member(f"{layer}.bias", 0, index(size), "affine"),
            Member(f"{follower}.weight", 1, index(size), "in"),
        )
        groups.append(Group(layer, size, members, (Site(follower, -1, index(size)),)))
    contractions = tuple(Contraction(f"{layer}.weight", 1) for layer in layers)
    return Graph(tuple(groups), (), contractions, shapes, tuple(shapes), (1, widths[0]))


class Residual(nn.Module):
    """One residual block, a depthwise convolution and a flattened head; for images of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.a = nn.Conv2d(8, 12, 3, padding=1)
        self.bn_a = nn.BatchNorm2d(12)
        self.b = nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=8)
        self.fc = nn.Linear(32, 5)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        stream = self.bn(self.conv(images_NCHW))
        stream = stream + self.b(self.bn_a(self.a(stream)).relu())
        return self.fc(self.depthwise(stream).flatten(1))


def residual_graph() -> Graph:
    """Groups of `Residual`: the stream ("conv", 8 channels) and the inside of the block ("a", 12 channels)."""
    tensors = Residual().state_dict()
    stream = (
        Member("conv.weight", 0, index(8), "out"),
        *_norm("bn", 8),
        Member("a.weight", 1, index(8), "in"),
        Member("b.weight", 0, index(8), "out"),
        Member("b.bias", 0, index(8), "affine"),
        Member("depthwise.weight", 0, index(8), "out"),
        Member("depthwise.bias", 0, index(8), "affine"),
        Member("fc.weight", 1, index(8, width=4), "in"),
    )
    inside = (
        Member("a.weight", 0, index(12), "out"),
        Member("a.bias", 0, index(12), "affine"),
        *_norm("bn_a", 12),
        Member("b.weight", 1, index(12), "in"),
    )
    groups = (
        Group("conv", 8, stream, (Site("a", 1, index(8)), Site("fc", -1, index(8, width=4)))),
        Group("a", 12, inside, (Site("b", 1, index(12)),)),
    )
    positions = {"conv": 16, "a": 16, "b": 16, "depthwise": 4, "fc": 1}
    contractions = tuple(Contraction(f"{layer}.weight", count) for layer, count in positions.items())
    parameters = tuple(name for name, _ in Residual().named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Graph(groups, (), contractions, shapes, parameters, (1, 3, 4, 4))


def zeroed(model: nn.Module, graph: Graph, kept: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Parameters of the dense network with zeros wherever a removed channel owns an entry."""
    whole = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    for name, channels in kept.items():
        gone = torch.ones(graph.group(name).size, dtype=torch.bool)
        gone[list(channels)] = False
        for member in graph.group(name).members:
            if member.tensor in whole:
                whole[member.tensor].index_fill_(member.dim, member.index_CK[gone].reshape(-1), 0.0)
    return whole


def _norm(name: str, size: int) -> tuple[Member, ...]:
    tensors = ("weight", "bias", "running_mean", "running_var")
    return tuple(Member(f"{name}.{tensor}", 0, index(size), "affine") for tensor in tensors)
