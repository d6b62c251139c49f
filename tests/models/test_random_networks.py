"""Random networks: whatever operations follow each other, a cut is right or its channels are refused; nothing crashes.

# B = rows, C = channels, H, W = pixels

A network is a graph of two to eight operations over a pool of images [B, C, H, W], each with its own C and side H = W. What
no other operation reads goes to a head of its own, and the heads are summed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.models.graph import Graph
from pipeline.pruning.plan import planned
from pipeline.pruning.reference import mask
from pipeline.pruning.surgery import cut
from pipeline.pruning.trials import random_subsets, trace
from pipeline.pruning.verify import compare, output_tensors, verify
from tests.models import odd_networks as odd
from tests.models.odd_networks import Parts, conv, parameter
from tests.models.test_odd_networks import NUM_ROWS, TOLERANCE, prepared, zeroed

SIDE = 4
IMAGE = torch.linspace(-1, 1, 3 * SIDE * SIDE).reshape(1, 3, SIDE, SIDE)
MAX_CHANNELS, MAX_SIDE = 24, 8
Draw = Callable[[st.SearchStrategy[Any]], Any]


class Value(NamedTuple):
    """What the network has computed: an image of so many channels, side x side pixels."""

    channels: int
    side: int


# --- operations -------------------------------------------------------------------------------------------------------


class ChannelsLast(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Tokens(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(2).mT).mT.unflatten(2, x.shape[2:])


class Gate(Parts):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * gate.sigmoid()


class HalvesByShape(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :].sigmoid()


class SplitByShape(Parts):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.split(x.shape[1] // 2, dim=1)
        return torch.cat([gate.tanh(), value], 1)


class FirstPart(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.k].contiguous()


class Shuffle(Parts):
    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        return x.view(B, self.g, C // self.g, H, W).transpose(1, 2).reshape(B, C, H, W)


class Flip(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(self.dim)


class PadChannels(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


class SqueezeExcite(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class LinearSqueezeExcite(Parts):
    def forward(self, x: Tensor) -> Tensor:
        B, C, _, _ = x.shape
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid().view(B, C, 1, 1)


class Scale(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.s.view(1, -1, 1, 1) + self.shift


class Einsum(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,oc->bohw", x, self.w)


class Matmul(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (x.permute(0, 2, 3, 1) @ self.w).permute(0, 3, 1, 2)


class MatmulFirst(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (self.w @ x.flatten(2)).view(x.shape[0], -1, *x.shape[2:])


class Twice(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(self.d(x).relu())


class TiedWeights(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return self.d(x) + F.conv2d(x.tanh(), self.d.weight)


class Maxout(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, 2)).amax(2)


class Softmax(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(1)


class OverChannels(Parts):
    """Mean, maximum or sum over the channels, for each pixel."""

    def forward(self, x: Tensor) -> Tensor:
        return x - getattr(x, self.kind)(1, keepdim=True)


class Fourier(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x, dim=1).real


class Sort(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class Add(Parts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.project(y)


class Multiply(Parts):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * self.project(y).sigmoid()


class Concatenate(Parts):
    def forward(self, *parts: Tensor) -> Tensor:
        return torch.cat(parts, 1)


# --- drawing them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Op:
    """An operation on one value."""

    make: Callable[[Draw, Value], tuple[nn.Module, Value]]
    fits: Callable[[Value], bool] = lambda x: True
    mixes: bool = False
    """It takes a statistic over channels, so zeros in the place of those that are removed are another function."""


def pick(draw: Draw, *choices: Any) -> Any:
    return draw(st.sampled_from(choices))


def divisor(draw: Draw, number: int, first: int = 1) -> int:
    return pick(draw, *[d for d in range(first, number + 1) if number % d == 0])


def plain(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    out, size, stride = pick(draw, 4, 6, 2, 8), pick(draw, 1, 3), pick(draw, 1, 2) if x.side > 2 else 1
    layer = conv(x.channels, out, size, stride=stride, padding=size // 2, bias=pick(draw, True, False))
    return layer, Value(out, -(-x.side // stride))


def grouped(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    groups = divisor(draw, x.channels)
    out = groups * pick(draw, 1, 2)
    return conv(x.channels, out, 3, padding=1, groups=groups), Value(out, x.side)


def depthwise(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    out = x.channels * pick(draw, 1, 2)
    return conv(x.channels, out, 3, padding=1, groups=x.channels, bias=pick(draw, True, False)), Value(out, x.side)


def transposed(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    groups = divisor(draw, x.channels)
    out = groups * pick(draw, 2, 1, 3)
    return nn.ConvTranspose2d(x.channels, out, 2, 2, groups=groups), Value(out, 2 * x.side)


def linear(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    out = pick(draw, 4, 6, 8)
    return ChannelsLast(inner=nn.Linear(x.channels, out)), Value(out, x.side)


def unequal_split(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    first = draw(st.integers(1, x.channels - 1))
    return pick(
        draw, odd.UnequalSplit(p=first, q=x.channels - first), odd.ListedSplit(sizes=[first, x.channels - first])
    ), x


def first_part(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    k = draw(st.integers(1, x.channels - 1))
    return FirstPart(k=k), Value(k, x.side)


def padded(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    before, after = draw(st.integers(0, 2)), draw(st.integers(1, 2))
    return PadChannels(before=before, after=after), Value(x.channels + before + after, x.side)


def squeeze_excite(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    inner = pick(draw, 3, 1, 4)
    c = x.channels
    return pick(
        draw,
        SqueezeExcite(down=conv(c, inner), up=conv(inner, c)),
        LinearSqueezeExcite(down=nn.Linear(c, inner), up=nn.Linear(inner, c)),
    ), x


def attention(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    heads = divisor(draw, x.channels)
    kinds = (odd.Attention, odd.ExplicitAttention, odd.OpenAttention, odd.ScaledAttention, odd.LinearAttention)
    modules = (*[kind(x.channels, heads) for kind in kinds], odd.Separate(x.channels, heads, kv_heads=heads))
    return Tokens(inner=pick(draw, *modules)), x


def pooled(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    return pick(draw, nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(x.side // 2)), Value(
        x.channels, x.side // 2
    )


def halved(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    k = x.channels // 2
    parts = (
        Gate(),
        HalvesByShape(),
        odd.Halves(k=k),
        odd.NegativeHalves(k=k),
        odd.Narrow(k=k),
        odd.Split(k=k),
        Maxout(),
        nn.GLU(1),
    )
    return pick(draw, *parts), Value(k, x.side)


def shuffled(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    groups = divisor(draw, x.channels)
    return pick(draw, Shuffle(g=groups), odd.Shuffle(groups=groups), nn.ChannelShuffle(groups)), x


def product(draw: Draw, x: Value) -> tuple[nn.Module, Value]:
    c, out = x.channels, pick(draw, 4, 6, 8)
    return pick(
        draw, Einsum(w=parameter(out, c)), Matmul(w=parameter(c, out)), MatmulFirst(w=parameter(out, c))
    ), Value(out, x.side)


def same(*modules: Callable[[int], nn.Module]) -> Callable[[Draw, Value], tuple[nn.Module, Value]]:
    """One of the modules, each made for so many channels and keeping them."""
    return lambda draw, x: (pick(draw, *modules)(x.channels), x)


def is_even(x: Value) -> bool:
    return x.channels % 2 == 0


def is_small(x: Value) -> bool:
    return x.channels <= MAX_CHANNELS // 2


def has_two(x: Value) -> bool:
    return x.channels > 1


OPS: dict[str, Op] = {
    "convolution": Op(plain),
    "grouped convolution": Op(grouped, is_small),
    "depthwise convolution": Op(depthwise, is_small),
    "transposed convolution": Op(transposed, lambda x: 2 * x.side <= MAX_SIDE and x.channels <= MAX_CHANNELS // 3),
    "linear": Op(linear),
    "activation": Op(same(lambda c: nn.ReLU(), lambda c: nn.GELU(), lambda c: nn.Sigmoid(), nn.PReLU)),
    "batch norm": Op(same(nn.BatchNorm2d)),
    "layer norm": Op(same(lambda c: ChannelsLast(inner=nn.LayerNorm(c))), mixes=True),
    "rms norm": Op(same(lambda c: ChannelsLast(inner=nn.RMSNorm(c))), mixes=True),
    "group norm of one group": Op(same(lambda c: nn.GroupNorm(1, c)), mixes=True),
    "group norm": Op(lambda draw, x: (nn.GroupNorm(divisor(draw, x.channels, 2), x.channels), x), has_two),
    "halves": Op(halved, is_even),
    "split by the shape": Op(same(lambda c: SplitByShape()), is_even),
    "unequal split": Op(unequal_split, has_two),
    "first part": Op(first_part, has_two),
    "channel shuffle": Op(shuffled),
    "pixel shuffle": Op(
        lambda draw, x: (nn.PixelShuffle(2), Value(x.channels // 4, 2 * x.side)),
        lambda x: x.channels % 4 == 0 and 2 * x.side <= MAX_SIDE,
    ),
    "pixel unshuffle": Op(
        lambda draw, x: (nn.PixelUnshuffle(2), Value(4 * x.channels, x.side // 2)),
        lambda x: x.side % 2 == 0 and 4 * x.channels <= MAX_CHANNELS,
    ),
    "flip": Op(lambda draw, x: (Flip(dim=pick(draw, 1, 2)), x)),
    "pad channels": Op(padded, is_small),
    "squeeze and excite": Op(squeeze_excite),
    "attention": Op(attention, has_two),
    "pooling": Op(pooled, lambda x: x.side > 1),
    "scale": Op(same(lambda c: Scale(s=parameter(c), shift=parameter(c, 1, 1)))),
    "matrix product": Op(product),
    "tied layers": Op(same(lambda c: Twice(d=conv(c, c)), lambda c: TiedWeights(d=conv(c, c)))),
    "softmax over channels": Op(same(lambda c: Softmax()), mixes=True),
    "statistic over channels": Op(same(*[lambda c, k=k: OverChannels(kind=k) for k in ("mean", "amax", "sum")]), mixes=True),
    "unknown": Op(same(lambda c: Fourier(), lambda c: Sort())),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """A module and the values that it reads: positions in the order in which they are made."""

    module: nn.Module
    reads: tuple[int, ...]
    makes: Value
    mixes: bool = False


def on_one(draw: Draw, steps: list[Step], i: int) -> Step:
    x = steps[i].makes
    op = OPS[pick(draw, *[name for name, op in OPS.items() if op.fits(x)])]
    module, makes = op.make(draw, x)
    return Step(module, (i,), makes, op.mixes)


def on_two(draw: Draw, steps: list[Step], i: int) -> Step:
    """A residual sum or a product, with a projection where the channels are not equally many."""
    x = steps[i].makes
    j = pick(draw, *[j for j, step in enumerate(steps) if step.makes.side == x.side])
    y = steps[j].makes
    project = nn.Identity() if y == x else conv(y.channels, x.channels)
    return Step(pick(draw, Add, Multiply)(project=project), (i, j), x)


def on_many(draw: Draw, steps: list[Step], i: int) -> Step:
    side = steps[i].makes.side
    fits = [j for j, step in enumerate(steps) if step.makes.side == side and step.makes.channels <= MAX_CHANNELS // 3]
    reads = (i, *draw(st.lists(st.sampled_from(fits), max_size=2))) if fits else (i,)
    return Step(Concatenate(), reads, Value(sum(steps[j].makes.channels for j in reads), side))


def once_more(draw: Draw, steps: list[Step], i: int) -> Step:
    """A layer that has run before, on another value."""
    x = steps[i].makes
    layers = [
        s
        for s in steps
        if isinstance(s.module, nn.Conv2d) and s.module.in_channels == x.channels and s.module.stride == (1, 1)
    ]
    if not layers:
        return on_one(draw, steps, i)
    again = pick(draw, *layers)
    return Step(again.module, (i,), Value(again.makes.channels, x.side))


class Drawn(nn.Module):
    """Steps one after another; the heads read what no step does."""

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()
        self.steps = nn.ModuleList([step.module for step in steps])
        self.reads = [step.reads for step in steps]
        self.ends = [i for i in range(len(steps)) if not any(i in reads for reads in self.reads[1:])]
        self.heads = nn.ModuleList([nn.Linear(steps[i].makes.channels, 2) for i in self.ends])
        self.mixes = any(step.mixes for step in steps)

    def forward(self, x: Tensor) -> Tensor:
        values = [self.steps[0](x)]
        for step, reads in zip(self.steps[1:], self.reads[1:], strict=True):
            values.append(step(*[values[i] for i in reads]))
        return sum(head(values[i].mean((2, 3))) for i, head in zip(self.ends, self.heads, strict=True))

    def extra_repr(self) -> str:
        return f"reads={self.reads}, ends={self.ends}"


@st.composite
def networks(draw: Draw) -> Drawn:
    width = pick(draw, 4, 6, 8, 12)
    steps = [Step(conv(3, width), (), Value(width, SIDE))]
    for _ in range(draw(st.integers(2, 8))):
        i = pick(draw, *reversed(range(len(steps))))
        how = pick(draw, on_one, on_one, on_one, on_two, on_many, once_more)
        steps.append(how(draw, steps, i))
    return Drawn(steps)


# --- the property -----------------------------------------------------------------------------------------------------


def assert_right_or_refused(net: Drawn) -> None:
    graph = trace(net, IMAGE)
    assert all(frozen.operation and frozen.where and frozen.reason for frozen in graph.frozen)
    model, inputs = prepared(net, IMAGE)
    for trial in range(2):
        kept = random_subsets(graph, seed=11, trial=trial)
        plan = planned(graph, kept)
        small, masked = cut(model, plan), mask(model, plan)
        verify(small, masked, inputs).require(TOLERANCE)
        if not net.mixes:
            with torch.no_grad():
                zeros = list(output_tensors(torch.func.functional_call(model, zeroed(model, graph, kept), inputs)))
                compare(list(output_tensors(masked(*inputs))), zeros, rows=NUM_ROWS).require(TOLERANCE)
    assert_traced_again(graph, kept, trace(copy.deepcopy(small), inputs[0][:1]))


def assert_traced_again(graph: Graph, kept: dict[str, tuple[int, ...]], again: Graph) -> None:
    """The groups of the cut network are those of the dense one without what went, layer by layer.

    Not so where one channel is left: a grouped convolution of one group is a plain one, whose inputs part, and a part of a
    split that is one channel wide is no axis of channels any more, so it is refused.
    """
    before, after = by_layer(graph, kept), by_layer(again, {})
    for layer, (sizes, num_frozen) in before.items():
        found = after.get(layer)
        if found is not None and min(sizes, default=1) > 1 and found[1] == num_frozen and len(found[0]) == len(sizes):
            assert found[0] == sizes, layer


def by_layer(graph: Graph, kept: dict[str, tuple[int, ...]]) -> dict[str, tuple[list[int], int]]:
    """Layer -> sizes of the groups named after it (the number behind "#" may change in a cut), and how many channels stay."""
    found: dict[str, tuple[list[int], int]] = {}
    for name, size, num_frozen in [(g.name, len(kept.get(g.name, range(g.size))), 0) for g in graph.groups] + [
        (f.group, 0, f.size) for f in graph.frozen
    ]:
        layer = name.partition("#")[0]
        sizes, frozen = found.get(layer, ([], 0))
        found[layer] = (sorted([*sizes, *[size] * (size > 0)]), frozen + num_frozen)
    return found


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(max_examples=60, suppress_health_check=CHECKS)
@given(networks())
def test_a_random_network_is_cut_right_or_refused(net):
    assert_right_or_refused(net)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=1500, suppress_health_check=CHECKS)
@given(networks())
def test_many_random_networks_are_cut_right_or_refused(net):
    assert_right_or_refused(net)
