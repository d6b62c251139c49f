"""Small networks with one unusual operation each, and what a trace must say about each.

# B = rows, C = channels, H, W = pixels, N = tokens, D = features, h = heads

"right": the channels around the operation can be cut, and every cut equals the masked network. "refused": the channels
that reach the operation stay, with a reason; what else is left can be cut. Wrong, or a crash, is never right.

The operation stands between layers whose names are the same everywhere: `a` writes what reaches it, `b` reads what it
gives, `c` reads `b`. So `b` is a group in (nearly) every network, and `a` is the one in question.

An operation whose code holds a number that depends on the channels is a module of its own, not a lambda, so that its
source can be found. "unsure" marks a status that is a judgement: both would be honest.
"""

from __future__ import annotations

import functools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

IMAGE = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
SEQUENCE = torch.linspace(-1, 1, 6 * 12).reshape(1, 6, 12)
TOKENS = torch.tensor([[1, 5, 3, 0, 2, 4]])


class Network(NamedTuple):
    """A network and a batch of one row that it accepts. Copy the module before use."""

    module: nn.Module
    example: Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    """What a trace of the network must say."""

    network: Network
    status: str
    """ "right" or "refused"."""
    groups: tuple[str, ...]
    """Groups of more than one channel."""
    frozen: tuple[str, ...] = ()
    """Groups of which every channel stays."""
    reason: str = ""
    """Part of the reason for each of `frozen`."""
    zeros: bool = True
    """Zeros in place of the removed channels are the same function; not so where a mean, maximum or softmax sees them."""


def right(network: Network, *groups: str, zeros: bool = True) -> Odd:
    return Odd(network=network, status="right", groups=groups or ("a", "b"), zeros=zeros)


def refused(
    network: Network, *frozen: str, reason: str = "", groups: tuple[str, ...] = ("b",), zeros: bool = True
) -> Odd:
    return Odd(network=network, status="refused", groups=groups, frozen=frozen or ("a",), reason=reason, zeros=zeros)


class Parts(nn.Module):
    """Layers, parameters, buffers and plain attributes by name; subclasses say what happens."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)


class Net(Parts):
    """What happens is a function of the parts and the input."""

    def __init__(self, run: Callable[..., Any], **parts: Any) -> None:
        super().__init__(**parts)
        self.run = run

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


Operation = nn.Module | Callable[..., Any]


def images(odd: Operation, reads: int = 12, b: nn.Module | None = None, a: nn.Module | None = None, **parts: Any) -> Network:  # fmt: skip
    """[B, 3, 8, 8] -> a -> [B, 12, 8, 8] -> odd -> [B, reads, ...] -> b -> relu -> c, with b of the kind that is given."""
    return Network(_between(a or conv(3, 12), odd, b or conv(reads, 6), parts), IMAGE)


def tokens(odd: Operation, reads: int = 12, width: int = 12, **parts: Any) -> Network:
    """[B, 6, 12] -> a -> [B, 6, width] -> odd -> [B, 6, reads] -> b -> relu -> c."""
    return Network(_between(nn.Linear(12, width), odd, nn.Linear(reads, 6), parts), SEQUENCE)


def _between(a: nn.Module, odd: Operation, b: nn.Module, parts: dict[str, Any]) -> nn.Module:
    middle = odd if isinstance(odd, nn.Module) else Net(odd, **parts)
    c = nn.Linear(6, 2) if isinstance(b, nn.Linear) else type(b)(6, 2, 1)
    return nn.Sequential(OrderedDict(a=a, odd=middle, b=b, relu=nn.ReLU(), c=c))


def whole(run: Operation, example: Any = IMAGE, **parts: Any) -> Network:
    """A network that is not of the form a, odd, b, c."""
    return Network(run if isinstance(run, nn.Module) else Net(run, **parts), example)


def conv(inputs: int, outputs: int, size: int = 1, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **kwargs)


def ramp(*shape: int) -> Tensor:
    return torch.linspace(0.5, 1.5, torch.Size(shape).numel()).reshape(shape)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(ramp(*shape))


PERMUTATION = torch.tensor([3, 1, 0, 2, 11, 10, 4, 5, 9, 8, 6, 7])


# --- slices and splits: sizes in the code and in attributes -----------------------------------------------------------


class LiteralHalves(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :6] * x[:, 6:].sigmoid()


class LiteralNegative(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :-4]


class LiteralSplit(Parts):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.split(6, dim=1)
        return value * gate.sigmoid()


class LiteralUnequalSplit(Parts):
    def forward(self, x: Tensor) -> Tensor:
        left, middle = torch.split(x, [4, 8], dim=1)
        return torch.cat([left.relu(), middle], 1)


class LiteralView(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 3, 4, 8, 8).sum(1)


class LiteralExpand(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x).sigmoid().expand(-1, 12, -1, -1)


class Halves(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.k] * x[:, self.k :].sigmoid()


class NegativeHalves(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : -self.k] * x[:, -self.k :].sigmoid()


class LastHalves(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.k] * x[..., self.k :].sigmoid()


class FirstPart(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.k]


class Narrow(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.narrow(1, 0, self.k) * x.narrow(1, self.k, self.k).sigmoid()


class Split(Parts):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.split(self.k, dim=1)
        return value * gate.sigmoid()


class EqualSplit(Parts):
    def forward(self, x: Tensor) -> Tensor:
        first, second, third = x.split([self.k, self.k, self.k], dim=1)
        return first * second.sigmoid() + third


class UnequalSplit(Parts):
    def forward(self, x: Tensor) -> Tensor:
        left, middle = torch.split(x, [self.p, self.q], dim=1)
        return torch.cat([left.relu(), middle], 1)


class ListedSplit(Parts):
    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.sizes, dim=1)
        return torch.cat([parts[0].relu(), *parts[1:]], 1)


class LastUnequalSplit(Parts):
    def forward(self, x: Tensor) -> Tensor:
        left, middle = x.split((self.p, self.q), dim=-1)
        return torch.cat([left.relu(), middle], -1)


class PartialConvolution(Parts):
    def forward(self, x: Tensor) -> Tensor:
        touched, rest = torch.split(x, [self.touched, self.rest], dim=1)
        return torch.cat((self.conv(touched), rest), 1)


class View(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.g, self.k, 8, 8).sum(1)


class Shuffle(Parts):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.view(batch, self.groups, channels // self.groups, height, width)
        return torch.transpose(x, 1, 2).contiguous().view(batch, -1, height, width)


class FlatByAttribute(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)).view(-1, self.num_features)


class SizeOfAnother(Parts):
    """Both are 12 channels wide, and only the code ties them."""

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        return self.d(x).flatten(2).reshape(batch, channels, height, width)


class FlatBySizeOfAnother(Parts):
    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        return self.d(x).mean((2, 3)).view(batch, channels)


class FixedFlatten(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 4).view(-1, 12 * 2 * 2)


class InPlacePart(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, : self.k] = x[:, : self.k].relu()
        return x


class InPlacePartAdd(Parts):
    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, : self.k] += 1.0
        return x


def group_std(x: Tensor, groups: int, eps: float = 1e-5) -> Tensor:
    """timm's, in EvoNorm: the number of groups is an argument, which it reads three times."""
    B, C, H, W = x.shape
    assert C % groups == 0, groups
    x = x.reshape(B, groups, C // groups, H, W)
    return x.var((2, 3, 4), unbiased=False, keepdim=True).add(eps).sqrt().expand(x.shape).reshape(B, C, H, W)


@functools.lru_cache(maxsize=0)
def thirds(x: Tensor) -> Tensor:
    """What decorates it is no function of Python's, and no copy of it can hold an edited one."""
    return x[:, :4] + x[:, 4:8] + x[:, 8:]


class CachedThirds(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return thirds(x)


class GroupStd(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return x * (x * self.v).sigmoid() / group_std(x, self.groups)


class ReboundGroupStd(Parts):
    """The argument is not what the code says it is later on."""

    def std(self, x: Tensor, groups: int | None = None) -> Tensor:
        groups = groups or x.shape[1] // 3
        assert x.shape[1] % groups == 0
        x = x.unflatten(1, (groups, 3))
        return x.std((2, 3, 4), keepdim=True).expand(x.shape).flatten(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.std(x, 4)


class Room(Parts):
    def forward(self, x: Tensor) -> Tensor:
        room = torch.zeros(x.shape[0], self.size, 8, 8, dtype=x.dtype)
        room[:, : x.shape[1]] = x
        return room


# --- attention: who states how many heads, and how wide they are ------------------------------------------------------


class Attention(Parts):
    """timm's: one linear layer for q, k, v; heads and their width are attributes, C comes from the input."""

    def __init__(self, dim: int = 16, num_heads: int = 4, **more: Any) -> None:
        head_dim = dim // num_heads
        super().__init__(qkv=nn.Linear(dim, 3 * dim), proj=nn.Linear(dim, dim),
                         num_heads=num_heads, head_dim=head_dim, scale=head_dim**-0.5, **more)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class ExplicitAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class OpenAttention(Attention):
    """No size is stated but the number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ScaledAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(x.transpose(1, 2).reshape(B, N, self.num_heads * self.head_dim))


class CausalAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.mT * self.scale).masked_fill(self.future, float("-inf"))
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class BiasedAttention(Attention):
    """Swin's table of relative positions, one column for each head."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = self.table[self.index.view(-1)].view(N, N, -1).permute(2, 0, 1).contiguous()
        attention = (q @ k.transpose(-2, -1) * self.scale + bias.unsqueeze(0)).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class TalkingHeads(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.talk((q @ k.mT * self.scale).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, C))


class NormedAttention(Attention):
    """q and k are normalised over the width of a head."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class ChannelAttention(Attention):
    """XCiT's: d x d scores inside each head, with a temperature for each head."""

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 4, 1).unbind(0)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attention = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((attention @ v).permute(0, 3, 1, 2).reshape(B, N, C))


class LinearAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        x = q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class RotaryAttention(Attention):
    """The halves of each head turn by an angle that depends on the position."""

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


class Separate(Parts):
    """q, k and v from layers of their own; `kv_heads` of them are shared by several heads of q."""

    def __init__(self, dim: int = 16, num_heads: int = 4, kv_heads: int = 4, **more: Any) -> None:
        head_dim = dim // num_heads
        super().__init__(q=nn.Linear(dim, dim), k=nn.Linear(dim, kv_heads * head_dim), v=nn.Linear(dim, kv_heads * head_dim),
                         proj=nn.Linear(dim, dim), num_heads=num_heads, kv_heads=kv_heads, head_dim=head_dim, **more)  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q = self.q(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))


class GroupedQueries(Separate):
    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q = self.q(x).view(B, N, self.num_heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(B, N, self.kv_heads, self.head_dim).transpose(1, 2)
        k, v = (part.repeat_interleave(self.num_heads // self.kv_heads, dim=1) for part in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SingleHead(Separate):
    def forward(self, x: Tensor) -> Tensor:
        return self.proj((self.q(x) @ self.k(x).mT * self.scale).softmax(-1) @ self.v(x))


class SingleHeadFused(Separate):
    """The scale is one over the root of the width, so q and k stay; v does not matter to it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x)))


class WindowAttention(Parts):
    def forward(self, x: Tensor) -> Tensor:
        B, H, W, C = x.shape
        k = self.window
        x = x.view(B, H // k, k, W // k, k, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, k * k, C)
        x = self.attention(x)
        return x.view(B, H // k, W // k, k, k, -1).permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, -1)


class PrefixTokens(Parts):
    """A class token and two registers before the patches, positions added to all of them."""

    def forward(self, x: Tensor) -> Tensor:
        first = [token.expand(x.shape[0], -1, -1) for token in (self.cls, self.registers)]
        x = torch.cat([*first, x], dim=1) + self.positions
        return (x + self.attention(x))[:, 0]


def attend(odd: nn.Module) -> Network:
    return tokens(odd, width=16, reads=16)


ATTENTION = ("a", "odd.qkv", "odd.proj", "b")


# --- further modules --------------------------------------------------------------------------------------------------


class Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Softplus(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.softplus(weight)


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.transpose(0, 1)


class StandardisedByBatchNorm(nn.Conv2d):
    """timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class StandardisedByMoments(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        var, mean = torch.var_mean(self.weight, dim=(1, 2, 3), keepdim=True, unbiased=False)
        return F.conv2d(x, (self.weight - mean) / (var + 1e-6).sqrt(), self.bias)


def by_old_hook(norm: Callable[[nn.Module], nn.Module], layer: nn.Module) -> nn.Module:
    """Normed without gradients, since otherwise its weight cannot be copied."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", FutureWarning)
        return norm(layer)


def parametrised(layer: nn.Module, by: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", by)


def sharing_weights(a: nn.Module, b: nn.Module) -> dict[str, nn.Module]:
    b.weight = a.weight
    return {"d": a, "e": b}


def plain_attribute(network: Network, **tensors: Tensor) -> Network:
    """Tensors that the module holds without having registered them."""
    for name, tensor in tensors.items():
        object.__setattr__(network.module.odd, name, tensor)
    return network


def dynamic_convolution(m: Any, x: Tensor) -> Tensor:
    """A kernel for each row, mixed from four."""
    B, C, H, W = x.shape
    weight = torch.einsum("be,eoikl->boikl", m.gate(x.mean((2, 3))).softmax(1), m.kernels).flatten(0, 1)
    return F.conv2d(x.reshape(1, B * C, H, W), weight, groups=B).view(B, -1, H, W)


def coordinate_attention(m: Any, x: Tensor) -> Tensor:
    rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)
    rows, columns = m.down(torch.cat([rows, columns], 2)).relu().split([x.shape[2], x.shape[3]], dim=2)
    return x * m.up_rows(rows).sigmoid() * m.up_columns(columns).transpose(2, 3).sigmoid()


def gated_channel_transformation(m: Any, x: Tensor) -> Tensor:
    energy = x.pow(2).sum((2, 3), keepdim=True).sqrt()
    return x * (1 + (m.g * energy / (energy.pow(2).mean(1, keepdim=True) + 1e-5).sqrt() + m.bias).tanh())


def global_response_norm(m: Any, x: Tensor) -> Tensor:
    energy = x.norm(dim=(2, 3), keepdim=True)
    return x + m.g * x * energy / (energy.mean(1, keepdim=True) + 1e-6)


def selective_kernels(m: Any, x: Tensor) -> Tensor:
    branches = torch.stack([m.small(x), m.large(x)], 1)
    squeezed = m.down(branches.sum(1).mean((2, 3), keepdim=True)).relu()
    weights = torch.stack([m.up_small(squeezed), m.up_large(squeezed)], 1).softmax(1)
    return (branches * weights).sum(1)


def product_by_heads(m: Any, x: Tensor) -> Tensor:
    heads_hTD = x.flatten(0, 1).unflatten(1, (3, -1)).transpose(0, 1)
    return torch.bmm(heads_hTD, m.w).transpose(0, 1).flatten(1).unflatten(0, x.shape[:2])


def non_local(m: Any, x: Tensor) -> Tensor:
    q, k, v = (layer(x).flatten(2) for layer in (m.q, m.k, m.v))
    return (v @ (q.mT @ k).softmax(-1).mT).unflatten(2, x.shape[2:])


def transformed_grid(m: Any, x: Tensor) -> Tensor:
    """Two channels are the coordinates at which the others are read."""
    return F.grid_sample(x, m.where(x).tanh().permute(0, 2, 3, 1), align_corners=False)


def in_steps(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros_like(x[:, :1])
    for i in range(x.shape[1]):
        total = total + x[:, i : i + 1] * x[:, i - 1 : i or None]
    return total


def branch_by_value(m: Any, x: Tensor) -> Tensor:
    return x.relu() if x.sum() > 0 else x


def write_by_index(m: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, torch.tensor([0, 5])] = 1.0
    return x


def into_zeros_like(m: Any, x: Tensor) -> Tensor:
    room = torch.zeros_like(x)
    room.copy_(x)
    return room + 1


def into_the_middle_of_space(m: Any, x: Tensor) -> Tensor:
    room = x.new_zeros(x.shape[0], x.shape[1], 10, 10)
    room[:, :, 1:-1, 1:-1] = x
    return room


def write_into_space(room: Tensor, x: Tensor) -> Tensor:
    room[:, :, 1:7] = x[:, :, :6]
    return room


def write_two(m: Any, x: Tensor) -> Tensor:
    room = x.new_zeros(x.shape[0], x.shape[1], 8, 16)
    room[..., :8] = x
    room[..., 8:] = m.d(x)
    return room


def write_across_channels(m: Any, x: Tensor) -> Tensor:
    """The channels of what is written lie along the rows of the room."""
    room = x.new_zeros(x.shape[0], 12, 14, 8)
    room[:, :8, 2:] = x.transpose(1, 2)
    return room


def seen_from_before(m: Any, x: Tensor) -> Tensor:
    room = x.new_zeros(x.shape[0], x.shape[1], 8, 8)
    early = room.flatten(2)
    room[:, :, 1:7] = x[:, :, 1:7]
    return early.view(x.shape) * m.d(x)


ODD: dict[str, Odd] = {
    # --- moving axes ---
    "view": right(images(lambda m, x: x.view(*x.shape[:2], -1).view(x.shape))),
    "reshape": right(images(lambda m, x: x.reshape(x.shape[0], -1, 64).unflatten(2, (8, 8)))),
    "view_as": right(images(lambda m, x: x.flatten(2).view_as(x))),
    "permute": right(images(lambda m, x: x.permute(0, 2, 3, 1), b=nn.Linear(12, 6))),
    "permute and back": right(images(lambda m, x: x.permute(2, 1, 0, 3).relu().permute(2, 1, 0, 3))),
    "movedim": right(images(lambda m, x: x.movedim(1, -1), b=nn.Linear(12, 6))),
    "swapaxes": right(images(lambda m, x: x.swapaxes(1, 3), b=nn.Linear(12, 6))),
    "T": right(images(lambda m, x: x.mean((2, 3)).T.relu().T, b=nn.Linear(12, 6))),
    "mT": right(images(lambda m, x: x.flatten(2).mT, b=nn.Linear(12, 6))),
    "flatten everything": right(images(lambda m, x: F.avg_pool2d(x, 4).flatten(1), b=nn.Linear(48, 6))),
    "flatten everything, channels last": right(
        images(lambda m, x: F.avg_pool2d(x, 4).permute(0, 2, 3, 1).flatten(1), b=nn.Linear(48, 6))
    ),
    "flatten tokens": right(whole(lambda m, x: m.b(m.a(x).flatten(1)), SEQUENCE, a=nn.Linear(12, 5), b=nn.Linear(30, 2)), "a"),
    "flatten batch and tokens": right(tokens(lambda m, x: x.flatten(0, 1).relu().view(*x.shape[:2], -1))),
    "unflatten the channels": right(images(lambda m, x: x.unflatten(1, (3, -1)).relu().flatten(1, 2))),
    "unflatten the channels, inner size": right(images(lambda m, x: x.unflatten(1, (-1, 3)).relu().flatten(1, 2))),  # unsure: threes go
    "sum over unflattened channels": right(images(lambda m, x: x.unflatten(1, (3, -1)).sum(1), reads=4)),
    "unflatten the features": right(tokens(lambda m, x: x.unflatten(2, (3, -1)).transpose(1, 2).transpose(1, 2).flatten(2))),
    "squeeze and unsqueeze": right(images(lambda m, x: x.unsqueeze(1).unsqueeze(-1).squeeze(-1).squeeze(1))),
    "squeeze a pooled image": right(images(lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(3).squeeze(2), b=nn.Linear(12, 6))),
    "expand": right(images(lambda m, x: x + x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 8))),
    "expand_as": right(images(lambda m, x: x * m.d(x).sigmoid().expand_as(x), d=conv(12, 1))),
    "a literal expand": refused(images(LiteralExpand(gate=conv(12, 1)))),  # unsure: the 12 could follow
    "channels_last memory": right(images(lambda m, x: x.contiguous(memory_format=torch.channels_last) + 1)),
    "broadcast over a new axis": right(images(lambda m, x: (x[:, None] * m.s).sum(1), s=parameter(2, 1, 1, 1))),
    "a literal view": right(images(LiteralView(), reads=4)),  # unsure: the 4 has to follow
    "view by attributes": right(images(View(g=3, k=4), reads=4)),
    "view by an attribute after pooling": right(images(FlatByAttribute(num_features=12), b=nn.Linear(12, 6))),
    "view by the size of another value": right(images(SizeOfAnother(d=conv(12, 12))), "a", "odd.d", "b"),
    "flat view by the size of another value": right(
        images(FlatBySizeOfAnother(d=conv(12, 12)), b=nn.Linear(12, 6)), "a", "odd.d", "b"
    ),
    "a literal flattening": right(images(FixedFlatten(), b=nn.Linear(48, 6))),  # unsure: the product has to follow
    # --- slices and splits ---
    "literal halves": right(images(LiteralHalves(), reads=6)),  # unsure: the 6 has to follow
    "literals in a function that is cached": refused(images(CachedThirds(), reads=4), reason="the cut network stops with"),
    "a literal negative bound": right(images(LiteralNegative(), reads=8)),
    "a literal split": right(images(LiteralSplit(), reads=6)),  # unsure
    "a literal unequal split": right(images(LiteralUnequalSplit())),  # unsure
    "one channel": refused(images(lambda m, x: x * x[:, 0:1])),
    "select": refused(images(lambda m, x: x + x[:, 3, None])),
    "halves by an attribute": right(images(Halves(k=6), reads=6)),
    "halves by an attribute, channels last": right(tokens(LastHalves(k=6), reads=6)),
    "negative halves by an attribute": right(images(NegativeHalves(k=6), reads=6)),  # unsure
    "the first part by an attribute": right(images(FirstPart(k=8), reads=8)),  # unsure: channels 8 to 11 are never read
    "narrow by an attribute": right(images(Narrow(k=6), reads=6)),
    "halves by the shape": right(images(lambda m, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :].sigmoid(), reads=6)),
    "halves by the shape, channels last": right(
        tokens(lambda m, x: x[..., : x.shape[-1] // 2] * x[..., x.shape[-1] // 2 :].sigmoid(), reads=6)
    ),
    "every second channel": refused(images(lambda m, x: x[:, ::2] * x[:, 1::2], reads=6)),  # unsure: pairs can go
    "a part of space": right(images(lambda m, x: x[:, :, 1:7, ::2])),
    "a part of the tokens": right(tokens(lambda m, x: x[:, 1:])),
    "the last token": right(tokens(lambda m, x: x[:, -1])),
    "narrow in space": right(images(lambda m, x: x.narrow(2, 1, 4))),
    "all channels, by a slice": right(images(lambda m, x: x[:, :, ...][:, slice(None)])),
    "chunk in 2": right(images(lambda m, x: (lambda p, q: p * q.sigmoid())(*x.chunk(2, 1)), reads=6)),
    "chunk in 3": right(images(lambda m, x: (lambda p, q, r: p * q.sigmoid() + r)(*x.chunk(3, 1)), reads=4)),
    "chunk in 2, channels last": right(tokens(lambda m, x: (lambda p, q: p * q.sigmoid())(*x.chunk(2, -1)), reads=6)),
    "chunk in space": right(images(lambda m, x: torch.cat(x.chunk(2, 2)[::-1], 2))),
    "chunk and cat in another order": right(images(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1))),
    "split by an attribute": right(images(Split(k=6), reads=6)),
    "split by equal attributes": right(images(EqualSplit(k=4), reads=4)),
    "split by unequal attributes": right(images(UnequalSplit(p=4, q=8))),
    "split by unequal attributes, channels last": right(tokens(LastUnequalSplit(p=4, q=8))),
    "split by a list": right(images(ListedSplit(sizes=[2, 4, 6]))),
    "split by a list of equals": right(images(ListedSplit(sizes=[4, 4, 4]))),
    "split by the shape": right(images(lambda m, x: sum(x.split(x.shape[1] // 3, 1)), reads=4)),
    "partial convolution": right(images(PartialConvolution(conv=conv(4, 4, 3, padding=1), touched=4, rest=8)), "b"),
    "tensor_split": right(images(lambda m, x: torch.stack(x.tensor_split(2, 1)).sum(0), reads=6)),  # unsure
    # --- concatenation and stacking ---
    "cat of 2": right(images(lambda m, x: torch.cat([x, m.d(x)], 1), reads=17, d=conv(12, 5)), "a", "odd.d", "b"),
    "cat of 3": right(
        images(lambda m, x: torch.cat([m.d(x), x, m.e(x)], 1), reads=21, d=conv(12, 5), e=conv(12, 4)), "a", "odd.d", "odd.e", "b"
    ),
    "cat of 4": right(
        images(lambda m, x: torch.cat([m.d(x), x, m.e(x), x.relu()], 1), reads=33, d=conv(12, 5), e=conv(12, 4)),
        "a", "odd.d", "odd.e", "b",
    ),
    "cat of tokens' features": right(tokens(lambda m, x: torch.cat([x, m.d(x)], -1), reads=17, d=nn.Linear(12, 5)), "a", "odd.d", "b"),
    "cat with the image": right(
        whole(lambda m, x: m.c(m.b(torch.cat([x, m.a(x)], 1)).relu()), a=conv(3, 12), b=conv(15, 6), c=conv(6, 2))
    ),
    "cat with itself": right(images(lambda m, x: torch.cat([x, x], 1), reads=24)),
    "cat of positive and negative": right(images(lambda m, x: torch.cat([x.relu(), (-x).relu()], 1), reads=24)),
    "cat in space": right(images(lambda m, x: torch.cat([x, m.d(x)], 3), d=conv(12, 12))),
    "cat and slice by the shape": refused(
        images(lambda m, x: torch.cat([m.d(x), x], 1)[:, m.d.weight.shape[0] :], d=conv(12, 5)), "a", "odd.d"
    ),
    "norm over a cat": right(
        images(lambda m, x: m.n(torch.cat([m.d(x), x], 1)), reads=17, d=conv(12, 5), n=nn.BatchNorm2d(17)), "a", "odd.d", "b"
    ),
    "stack and sum": right(images(lambda m, x: torch.stack([x, m.d(x)]).sum(0), d=conv(12, 12))),
    "stack and max": right(images(lambda m, x: torch.stack([x, m.d(x)], 2).amax(2), d=conv(12, 12))),
    "stack and flatten": right(images(lambda m, x: torch.stack([x, x.relu()], 1).flatten(1, 2), reads=24)),
    "interleave by stacking": right(images(lambda m, x: torch.stack([x, x.relu()], 2).flatten(1, 2), reads=24)),
    "unbind and stack": refused(images(lambda m, x: torch.stack(x.unbind(1), 1))),  # unsure: in running order, whatever their number
    "unbind tokens and stack": right(tokens(lambda m, x: torch.stack(x.unbind(1)[::2], 1))),
    "one by one": refused(images(in_steps, reads=1)),  # unsure
    "flip the channels": right(images(lambda m, x: x.flip(1))),
    "flip space": right(images(lambda m, x: x.flip((2, 3)))),
    "roll the channels": refused(images(lambda m, x: x.roll(1, 1))),
    "roll the features": refused(tokens(lambda m, x: x.roll(2, -1))),
    "roll space": right(images(lambda m, x: x.roll((1, 2), (2, 3)))),
    "rot90": right(images(lambda m, x: x.rot90(1, (2, 3)))),
    # --- padding and repeating ---
    "pad the channels": right(images(lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 3)), reads=17)),
    "pad the features": right(tokens(lambda m, x: F.pad(x, (1, 2)), reads=15)),
    "pad space with a constant": right(images(lambda m, x: F.pad(x, (1, 2, 0, 1), value=0.7))),
    "pad space by reflection": right(images(lambda m, x: F.pad(x, (1, 2, 0, 1), "reflect"))),
    "pad space by replication": right(images(lambda m, x: F.pad(x, (1, 2, 0, 1), "replicate"))),
    "pad space in a circle": right(images(lambda m, x: F.pad(x, (1, 2, 0, 1), "circular"))),
    "repeat the channels": right(images(lambda m, x: x.repeat(1, 2, 1, 1), reads=24)),
    "repeat_interleave the channels": right(images(lambda m, x: x.repeat_interleave(2, 1), reads=24)),
    "repeat_interleave the features": right(tokens(lambda m, x: x.repeat_interleave(2, -1), reads=24)),
    "tile the channels": right(images(lambda m, x: x.tile(1, 3, 1, 1), reads=36)),
    "repeat space": right(images(lambda m, x: x.repeat(1, 1, 2, 1))),
    "a shortcut of strides and padded channels": right(
        whole(
            lambda m, x: m.c(m.b(F.pad(m.a(x)[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3)) + m.d(x)).relu()),
            a=conv(3, 6), d=conv(3, 12, 3, stride=2, padding=1), b=conv(12, 6), c=conv(6, 2),
        )
    ),
    # --- indexing ---
    "index_select by a buffer": refused(images(lambda m, x: x.index_select(1, m.order), order=PERMUTATION.clone())),
    "a buffer as index": refused(images(lambda m, x: x[:, m.order], order=PERMUTATION.clone())),
    "a buffer as index, channels last": refused(tokens(lambda m, x: x[..., m.order], order=PERMUTATION.clone())),
    "a buffer that picks some": refused(images(lambda m, x: x[:, m.order], reads=5, order=PERMUTATION[:5].clone())),  # unsure
    "a list as index": refused(images(lambda m, x: x[:, [3, 1, 0, 2, 4, 5, 6, 7, 8, 9, 11, 10]])),
    "a list as index of tokens": right(tokens(lambda m, x: x[:, [5, 0, 3]])),
    "gather channels": refused(images(lambda m, x: x.gather(1, m.order.view(1, -1, 1, 1).expand_as(x)), order=PERMUTATION.clone())),  # unsure
    "gather pixels": right(
        images(lambda m, x: x.flatten(2).gather(2, m.at.expand(*x.shape[:2], -1)), b=nn.Conv1d(12, 6, 1), at=torch.tensor([5, 9, 0]))
    ),
    "take_along_dim on channels": refused(images(lambda m, x: x.take_along_dim(x.argsort(1), 1))),
    "take_along_dim on tokens": right(tokens(lambda m, x: x.take_along_dim(m.at[None, :, None], 1), at=torch.tensor([4, 1]))),
    "masked_select": refused(images(lambda m, x: x.masked_select(x > 0).mean() * m.d(x), d=conv(12, 12)), groups=()),
    "a mask as index": refused(images(lambda m, x: x[x > 0].sum() * m.d(x), d=conv(12, 12)), groups=()),
    "where": right(images(lambda m, x: torch.where(x > 0, x, 0.1 * x))),
    "where, by a buffer": right(images(lambda m, x: torch.where(m.keep, x, x.relu()), keep=(PERMUTATION > 5).view(12, 1, 1))),
    "masked_fill": right(images(lambda m, x: x.masked_fill(x < 0, 0.5))),
    "masked_fill by a buffer": right(tokens(lambda m, x: x.masked_fill(m.gone, 0.0), gone=PERMUTATION > 5)),
    "scatter": refused(images(lambda m, x: torch.zeros_like(x).scatter(1, m.order.view(1, -1, 1, 1).expand_as(x), x), order=PERMUTATION.clone())),
    "index_copy": refused(images(lambda m, x: torch.zeros_like(x).index_copy(1, m.order, x), order=PERMUTATION.clone())),
    "index_add": refused(images(lambda m, x: x.index_add(1, m.order, x), order=PERMUTATION.clone())),
    # --- shuffles and windows ---
    "pixel_shuffle": right(images(lambda m, x: F.pixel_shuffle(x, 2), reads=3)),
    "pixel_unshuffle": right(images(lambda m, x: F.pixel_unshuffle(x, 2), reads=48)),
    "channel_shuffle": right(images(nn.ChannelShuffle(3))),
    "channel shuffle by hand": right(images(Shuffle(groups=2))),
    "channel shuffle by hand, sizes open": right(images(lambda m, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))),
    "space to depth by hand": right(
        images(lambda m, x: x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3), reads=48)
    ),
    "patch merging": right(
        images(lambda m, x: torch.cat([x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1).permute(0, 2, 3, 1), b=nn.Linear(48, 6))
    ),
    "im2col": right(images(lambda m, x: F.unfold(x, 3, padding=1), b=nn.Conv1d(108, 6, 1))),
    "im2col and back": right(images(lambda m, x: F.fold(F.unfold(x, 2, stride=2), (8, 8), 2, stride=2))),  # unsure
    "unfold space": right(images(lambda m, x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)))),
    "unfold tokens": right(tokens(lambda m, x: x.unfold(1, 3, 1).amax(-1))),
    "unfold the channels": refused(images(lambda m, x: x.unfold(1, 2, 2).mean(-1), reads=6)),
    "pool the channels": refused(tokens(lambda m, x: F.avg_pool1d(x, 2), reads=6)),
    "resize the channels": refused(tokens(lambda m, x: F.interpolate(x, scale_factor=2, mode="nearest"), reads=24)),
    # --- convolutions ---
    "grouped convolution, 2": right(images(lambda m, x: m.d(x), reads=10, d=conv(12, 10, 3, padding=1, groups=2))),
    "grouped convolution, 4": right(images(lambda m, x: m.d(x), reads=8, d=conv(12, 8, groups=4))),
    "depthwise convolution": right(images(lambda m, x: m.d(x), d=conv(12, 12, 3, padding=1, groups=12))),
    "depthwise convolution, two for each": right(images(lambda m, x: m.d(x), reads=24, d=conv(12, 24, 3, groups=12))),
    "grouped convolution of shuffled channels": right(
        images(lambda m, x: m.e(F.channel_shuffle(m.d(x), 3)), reads=6, d=conv(12, 12, groups=3), e=conv(12, 6, groups=2)), "b"
    ),  # whole groups of both are all channels; the same offset in each could go
    "transposed convolution": right(images(lambda m, x: m.d(x), reads=5, d=nn.ConvTranspose2d(12, 5, 2, 2)), "a", "odd.d", "b"),
    "grouped transposed convolution": right(images(lambda m, x: m.d(x), reads=8, d=nn.ConvTranspose2d(12, 8, 2, 2, groups=4))),  # unsure
    "depthwise transposed convolution": right(images(lambda m, x: m.d(x), d=nn.ConvTranspose2d(12, 12, 2, 2, groups=12))),  # unsure
    "conv1d": right(images(lambda m, x: m.d(x.flatten(2)), b=nn.Conv1d(7, 6, 1), d=nn.Conv1d(12, 7, 3)), "a", "odd.d", "b"),
    "conv3d": right(images(lambda m, x: m.d(x[:, :, None])[:, :, 0], reads=7, d=nn.Conv3d(12, 7, (1, 3, 3))), "a", "odd.d", "b"),
    "dilated and strided": right(images(lambda m, x: m.d(x), reads=7, d=conv(12, 7, 3, dilation=2, stride=2)), "a", "odd.d", "b"),
    "circular convolution": right(
        images(lambda m, x: m.d(x), reads=7, d=conv(12, 7, 3, padding=1, padding_mode="circular")), "a", "odd.d", "b"
    ),
    "convolution, same padding": right(images(lambda m, x: m.d(x), reads=7, d=conv(12, 7, 3, padding="same")), "a", "odd.d", "b"),
    "blur": right(images(lambda m, x: F.conv2d(x, m.k.expand(x.shape[1], 1, 3, 3), groups=x.shape[1]), k=torch.full((1, 1, 3, 3), 0.1))),
    "a convolution over channels": right(images(lambda m, x: m.d(x.transpose(1, 2)).transpose(1, 2), d=conv(8, 8, 3, padding=1)), zeros=False),
    "one channel between": right(images(lambda m, x: m.e(m.d(x)), d=conv(12, 1), e=conv(1, 12))),
    # --- matrix products ---
    "linear over the last axis of an image": right(
        images(lambda m, x: m.d(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), reads=7, d=nn.Linear(12, 7)), "a", "odd.d", "b"
    ),
    "linear over the width": right(images(lambda m, x: m.d(x), d=nn.Linear(8, 8))),
    "linear over tokens": right(tokens(lambda m, x: m.e(m.d(x.mT).relu()).mT, d=nn.Linear(6, 5), e=nn.Linear(5, 6)), "a", "odd.d", "b"),
    "bilinear": right(
        tokens(lambda m, x: m.d(x, m.e(x)), reads=7, d=nn.Bilinear(12, 5, 7), e=nn.Linear(12, 5)), "a", "odd.d", "odd.e", "b"
    ),
    "bilinear of a value with itself": right(tokens(lambda m, x: m.d(x, x.relu()), reads=7, d=nn.Bilinear(12, 12, 7)), "a", "odd.d", "b"),
    "bilinear with the input": right(
        whole(lambda m, x: m.c(m.b(m.d(x, m.a(x))).relu()), SEQUENCE,
              a=nn.Linear(12, 5), d=nn.Bilinear(12, 5, 7), b=nn.Linear(7, 6), c=nn.Linear(6, 2)), "a", "d", "b"
    ),
    "bilinear with a weight that is computed": refused(
        tokens(lambda m, x: F.bilinear(x, x, m.e(x).mean((0, 1)).view(1, 12, 12)), reads=1, e=nn.Linear(12, 144)), "a", "odd.e"
    ),
    "einsum with a parameter": right(images(lambda m, x: torch.einsum("bchw,oc->bohw", x, m.w), reads=7, w=parameter(7, 12)), "a", "odd", "b"),
    "einsum with a parameter first": right(
        images(lambda m, x: torch.einsum("oc,bchw->bhwo", m.w, x), b=nn.Linear(7, 6), w=parameter(7, 12)), "a", "odd", "b"
    ),
    "einsum to a sum of channels": right(images(lambda m, x: x * torch.einsum("bchw,c->bhw", x, m.w)[:, None], w=parameter(12))),
    "einsum of two values": right(tokens(lambda m, x: torch.einsum("bnc,bmc->bnm", x, m.d(x)).softmax(-1) @ x, d=nn.Linear(12, 12))),
    "x @ parameter": right(tokens(lambda m, x: x @ m.w, reads=7, w=parameter(12, 7)), "a", "odd", "b"),
    "x @ parameter.T": right(tokens(lambda m, x: x @ m.w.T, reads=7, w=parameter(7, 12)), "a", "odd", "b"),
    "parameter @ x": right(images(lambda m, x: m.w @ x.flatten(2), b=nn.Conv1d(7, 6, 1), w=parameter(7, 12)), "a", "odd", "b"),
    "x @ parameter + parameter": right(tokens(lambda m, x: x @ m.w + m.bias, reads=7, w=parameter(12, 7), bias=parameter(7)), "a", "odd", "b"),
    "vector @ x": refused(images(lambda m, x: x * (m.w @ x.flatten(2)).view(-1, 1, 8, 8), w=parameter(12))),
    "a matrix for each head": right(
        images(lambda m, x: (m.w @ x.flatten(2).unflatten(1, (3, -1))).flatten(1, 2), b=nn.Conv1d(15, 6, 1), w=parameter(3, 5, 4))
    ),
    "bmm with a matrix for each head": right(tokens(product_by_heads, reads=15, w=parameter(3, 4, 5))),
    "einsum with a matrix for each head": right(
        tokens(lambda m, x: torch.einsum("bnhd,hdo->bnho", x.unflatten(2, (3, -1)), m.w).flatten(2), reads=15, w=parameter(3, 4, 5))
    ),
    "tensordot": right(images(lambda m, x: torch.tensordot(x, m.w, dims=([1], [0])), b=nn.Linear(7, 6), w=parameter(12, 7)), "a", "odd", "b"),
    "addmm": right(
        images(lambda m, x: torch.addmm(m.bias, x.mean((2, 3)), m.w), b=nn.Linear(7, 6), w=parameter(12, 7), bias=parameter(7)), "a", "odd", "b"
    ),
    "baddbmm": right(
        tokens(lambda m, x: torch.baddbmm(m.bias, x, m.w.expand(x.shape[0], -1, -1)), reads=7, w=parameter(1, 12, 7), bias=parameter(1, 1, 7)),
        "a", "odd", "b",
    ),  # unsure
    "linear with a weight of another module": right(
        tokens(lambda m, x: F.linear(x, m.d.weight), reads=7, d=nn.Linear(12, 7, bias=False)), "a", "odd.d", "b"
    ),  # unsure
    "conv2d with a weight of another module": right(
        images(lambda m, x: F.conv2d(x, m.d.weight, m.d.bias), reads=7, d=conv(12, 7)), "a", "odd.d", "b"
    ),  # unsure
    "a convolution used as a linear layer": right(
        images(lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.d.weight.flatten(1)), b=nn.Linear(7, 6), d=conv(12, 7, bias=False)), "a", "odd.d", "b"
    ),  # unsure
    "weight of low rank": right(tokens(lambda m, x: F.linear(x, m.u @ m.v), reads=7, u=parameter(7, 3), v=parameter(3, 12)), "a"),
    "low rank beside a layer": right(
        tokens(lambda m, x: m.d(x) + x @ m.v @ m.u, reads=7, d=nn.Linear(12, 7), u=parameter(3, 7), v=parameter(12, 3)), "a", "odd.d", "b"
    ),
    "conditional kernels": refused(
        images(dynamic_convolution, reads=5, gate=nn.Linear(12, 4), kernels=parameter(4, 5, 12, 1, 1)), zeros=False
    ),  # a softmax over the experts, which may be a group of their own
    "a mixture of kernels": refused(
        images(lambda m, x: F.conv2d(x, (m.mix.softmax(0).view(-1, 1, 1, 1, 1) * m.kernels).sum(0)),
               reads=5, mix=parameter(4), kernels=parameter(4, 5, 12, 1, 1)), zeros=False
    ),  # unsure: made of parameters alone
    "a hypernetwork": refused(images(lambda m, x: F.conv2d(x, m.d(x).mean((0, 2, 3)).view(3, -1, 1, 1)), reads=3, d=conv(12, 36))),
    "gram matrix": refused(images(lambda m, x: (x.flatten(2) @ x.flatten(2).mT).flatten(1), b=nn.Linear(144, 6))),  # unsure: outer products can go
    "cdist": refused(tokens(lambda m, x: torch.cdist(x, x), reads=6)),  # unsure: a sum over channels
    "cosine similarity": right(tokens(lambda m, x: x * F.cosine_similarity(x, m.d(x), dim=-1)[..., None], d=nn.Linear(12, 12))),  # unsure
    # --- parameters and buffers ---
    "scale": right(images(lambda m, x: x * m.s, s=parameter(12, 1, 1))),
    "bias": right(images(lambda m, x: x + m.s, s=parameter(1, 12, 1, 1))),
    "gate": right(images(lambda m, x: x * m.s.sigmoid(), s=parameter(12, 1, 1))),
    "positions": right(images(lambda m, x: x + m.s, s=parameter(1, 12, 8, 8))),
    "layer scale": right(tokens(lambda m, x: x + m.s * m.d(x), s=parameter(12), d=nn.Linear(12, 12))),
    "buffer scale": right(images(lambda m, x: x * m.s, s=torch.linspace(1, 2, 12).view(12, 1, 1))),
    "scalar parameter": right(images(lambda m, x: x * m.s, s=nn.Parameter(torch.tensor(0.5)))),
    "scalar power": right(images(lambda m, x: x.abs().clamp(min=1e-3) ** m.p, p=nn.Parameter(torch.ones(1)))),
    "a parameter reshaped before use": right(images(lambda m, x: x * m.s.view(1, -1, 1, 1), s=parameter(12))),
    "a parameter of two axes reshaped": right(images(lambda m, x: x * m.s.view(1, -1, 1, 1), s=parameter(2, 6))),  # unsure
    "an unregistered tensor": refused(plain_attribute(images(lambda m, x: x * m.k), k=torch.linspace(1, 2, 12).view(12, 1, 1))),
    "numbers for each channel in the code": refused(images(lambda m, x: x * torch.arange(1.0, 13.0, dtype=x.dtype).view(12, 1, 1))),
    "numbers by the shape": refused(images(lambda m, x: x * torch.arange(x.shape[1], dtype=x.dtype).view(-1, 1, 1))),
    "ones by the shape": right(images(lambda m, x: x + x.new_ones(x.shape[1], 1, 1))),  # unsure
    "divided by the number of channels": refused(images(lambda m, x: x / x.shape[1])),
    "a mean by hand": refused(images(lambda m, x: x - x.sum(1, keepdim=True) / x.shape[1])),  # unsure
    # --- gates and attention over channels ---
    "squeeze and excite": right(
        images(lambda m, x: x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid(), down=conv(12, 5), up=conv(5, 12)), "a", "odd.down", "b"
    ),
    "squeeze and excite, linear": right(
        images(lambda m, x: x * m.up(m.down(x.mean((2, 3))).relu()).sigmoid().view(*x.shape[:2], 1, 1), down=nn.Linear(12, 5), up=nn.Linear(5, 12)),
        "a", "odd.down", "b",
    ),
    "efficient channel attention": right(
        images(lambda m, x: x * m.d(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None], d=nn.Conv1d(1, 1, 3, padding=1)),
        zeros=False,
    ),  # over its neighbours among the channels that are kept
    "spatial attention by mean and max": right(
        images(lambda m, x: x * m.d(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid(), d=conv(2, 1, 3, padding=1)),
        zeros=False,
    ),
    "gated channel transformation": right(
        images(gated_channel_transformation, g=parameter(1, 12, 1, 1), bias=parameter(1, 12, 1, 1)), zeros=False
    ),
    "global response norm": right(
        images(global_response_norm, g=parameter(12, 1, 1)), zeros=False
    ),
    "coordinate attention": right(
        images(coordinate_attention, down=conv(12, 5), up_rows=conv(5, 12), up_columns=conv(5, 12)), "a", "odd.down", "b"
    ),
    "selective kernels": right(
        images(selective_kernels,
               reads=7, small=conv(12, 7), large=conv(12, 7, 3, padding=1), down=conv(7, 4), up_small=conv(4, 7), up_large=conv(4, 7)),
        "a", "odd.small", "odd.down", "b",
    ),
    "glu": right(images(lambda m, x: F.glu(x, 1), reads=6)),
    "glu, channels last": right(tokens(lambda m, x: F.glu(x), reads=6)),
    "geglu": right(
        tokens(lambda m, x: (lambda value, gate: value * F.gelu(gate))(*m.d(x).chunk(2, -1)), reads=8, d=nn.Linear(12, 16)), "a", "odd.d", "b"
    ),
    "swiglu": right(tokens(lambda m, x: F.silu(m.d(x)) * m.e(x), reads=8, d=nn.Linear(12, 8), e=nn.Linear(12, 8)), "a", "odd.d", "b"),
    "maxout": right(images(lambda m, x: x.unflatten(1, (-1, 2)).amax(2), reads=6)),
    "maxout of halves": right(images(lambda m, x: torch.maximum(*x.chunk(2, 1)), reads=6)),
    "maxout, sizes by the shape": right(images(lambda m, x: x.view(x.shape[0], x.shape[1] // 2, 2, 8, 8).max(2).values, reads=6)),
    "prelu": right(images(lambda m, x: m.d(x), d=nn.PReLU(12))),
    "prelu, one slope": right(images(lambda m, x: m.d(x), d=nn.PReLU())),
    # --- norms ---
    "batch norm 1d": right(images(lambda m, x: m.n(x.mean((2, 3))), b=nn.Linear(12, 6), n=nn.BatchNorm1d(12))),
    "batch norm 1d of tokens": right(tokens(lambda m, x: m.n(x.mT).mT, n=nn.BatchNorm1d(12))),
    "batch norm 2d": right(images(lambda m, x: m.n(x), n=nn.BatchNorm2d(12))),
    "batch norm 3d": right(images(lambda m, x: m.n(x[:, :, None])[:, :, 0], n=nn.BatchNorm3d(12))),
    "batch norm without scale": right(images(lambda m, x: m.n(x), n=nn.BatchNorm2d(12, affine=False))),
    "batch norm of the batch": right(images(lambda m, x: m.n(x), n=nn.BatchNorm2d(12, track_running_stats=False))),
    "batch norm over tokens": right(tokens(lambda m, x: m.n(x), n=nn.BatchNorm1d(6))),
    "batch norm of the batch over channels": right(
        tokens(lambda m, x: m.n(x), n=nn.BatchNorm1d(6, track_running_stats=False)), zeros=False
    ),  # unsure
    "layer norm": right(tokens(lambda m, x: m.n(x), n=nn.LayerNorm(12)), zeros=False),
    "layer norm without scale": right(
        tokens(lambda m, x: m.n(x), n=nn.LayerNorm(12, elementwise_affine=False)), zeros=False
    ),  # unsure: no weight tells its size
    "layer norm without bias": right(tokens(lambda m, x: m.n(x), n=nn.LayerNorm(12, bias=False)), zeros=False),
    "layer norm as a function": right(tokens(lambda m, x: F.layer_norm(x, x.shape[-1:])), zeros=False),
    "layer norm by permuting": right(images(lambda m, x: m.n(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), n=nn.LayerNorm(12)), zeros=False),
    "layer norm over everything": right(images(lambda m, x: m.n(x), n=nn.LayerNorm([12, 8, 8])), zeros=False),
    "layer norm over space": right(images(lambda m, x: m.n(x), n=nn.LayerNorm([8, 8]))),
    "layer norm by hand": right(
        images(lambda m, x: (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt() * m.g, g=parameter(12, 1, 1)),
        zeros=False,
    ),
    "group norm of one group": right(images(lambda m, x: m.n(x), n=nn.GroupNorm(1, 12)), zeros=False),
    "group norm": right(images(lambda m, x: m.n(x), n=nn.GroupNorm(3, 12)), zeros=False),
    "group norm of single channels": right(images(lambda m, x: m.n(x), n=nn.GroupNorm(12, 12)), zeros=False),
    "standard deviation of groups": right(images(GroupStd(v=parameter(12, 1, 1), groups=4))),
    "standard deviation of groups, rebound": refused(images(ReboundGroupStd()), reason="the cut network stops with"),
    "group norm without scale": right(images(lambda m, x: m.n(x), n=nn.GroupNorm(3, 12, affine=False)), zeros=False),  # unsure
    "instance norm": right(images(lambda m, x: m.n(x), n=nn.InstanceNorm2d(12, affine=True))),
    "rms norm": right(tokens(lambda m, x: m.n(x), n=nn.RMSNorm(12)), zeros=False),
    "rms norm by hand": right(tokens(lambda m, x: x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * m.g, g=parameter(12)), zeros=False),
    "local response norm": refused(images(lambda m, x: m.n(x), n=nn.LocalResponseNorm(3))),
    "l2 norm": right(images(lambda m, x: F.normalize(x, dim=1))),
    "l2 norm of features": right(tokens(lambda m, x: x / x.norm(dim=-1, keepdim=True))),
    # --- statistics over channels ---
    "softmax over channels": right(images(lambda m, x: x.softmax(1)), zeros=False),
    "softmax over features": right(tokens(lambda m, x: x * x.softmax(-1)), zeros=False),
    "log_softmax over channels": right(images(lambda m, x: F.log_softmax(x, 1)), zeros=False),
    "softmax over space": right(images(lambda m, x: x.flatten(2).softmax(2).view_as(x))),
    "mean over channels": right(images(lambda m, x: x * x.mean(1, keepdim=True)), zeros=False),
    "mean over channels alone": refused(images(lambda m, x: x.mean(1, keepdim=True), reads=1), zeros=False),
    "sum over channels": right(images(lambda m, x: x * x.sum(1, keepdim=True))),
    "max over channels": right(images(lambda m, x: x * x.amax(1, keepdim=True)), zeros=False),
    "max and where over channels": right(images(lambda m, x: x * x.max(1, keepdim=True).values), zeros=False),
    "std over channels": right(images(lambda m, x: x / (x.std(1, keepdim=True) + 1)), zeros=False),
    "logsumexp over channels": right(images(lambda m, x: x - x.logsumexp(1, keepdim=True)), zeros=False),
    "mean over everything": right(images(lambda m, x: x - x.mean((1, 2, 3), keepdim=True)), zeros=False),
    "cumsum over channels": right(images(lambda m, x: x.cumsum(1))),
    "cumsum over tokens": right(tokens(lambda m, x: x.cumsum(1))),
    "sort the channels": refused(images(lambda m, x: x.sort(1).values)),
    "topk of channels": refused(images(lambda m, x: x.topk(4, 1).values, reads=4)),
    "topk of tokens": right(tokens(lambda m, x: x.topk(2, 1).values)),
    "argmax over channels": refused(images(lambda m, x: x * x.argmax(1, keepdim=True))),
    "kthvalue of channels": refused(images(lambda m, x: x * x.kthvalue(2, 1, keepdim=True).values)),
    # --- weights that are computed ---
    "weight_norm": right(
        images(lambda m, x: m.d(x), reads=7, d=parametrizations.weight_norm(conv(12, 7))), "a", "odd.d.parametrizations.weight", zeros=False
    ),  # unsure of the second group's name
    "weight_norm by the old hook": right(
        images(lambda m, x: m.d(x), reads=7, d=by_old_hook(nn.utils.weight_norm, conv(12, 7))), "a", "odd.d", zeros=False
    ),  # unsure: its parameters are weight_g and weight_v
    "spectral_norm": right(
        images(lambda m, x: m.d(x), reads=7, d=parametrizations.spectral_norm(conv(12, 7))), "a", "odd.d.parametrizations.weight", "b"
    ),
    "spectral_norm by the old hook": right(
        images(lambda m, x: m.d(x), reads=7, d=by_old_hook(nn.utils.spectral_norm, conv(12, 7))), "a", "odd.d", "b"
    ),
    "weights standardised by batch norm": right(
        images(lambda m, x: m.d(x), reads=7, d=StandardisedByBatchNorm(12, 7, 1)), "a", "odd.d", "b", zeros=False
    ),
    "weights standardised by moments": right(images(lambda m, x: m.d(x), reads=7, d=StandardisedByMoments(12, 7, 1)), "a", "odd.d", "b", zeros=False),
    "a parametrisation of one's own": right(
        images(lambda m, x: m.d(x), reads=7, d=parametrised(conv(12, 7), Softplus())), "a", "odd.d.parametrizations.weight", "b", zeros=False
    ),  # unsure of the name; softplus(0) is not 0
    "a symmetric weight": right(tokens(lambda m, x: m.d(x), d=parametrised(nn.Linear(12, 12), Symmetric()))),  # unsure
    # --- layers that are shared ---
    "tied layers": right(images(lambda m, x: m.e(m.d(x)), **sharing_weights(conv(12, 12), conv(12, 12)))),
    "a layer called twice": right(images(lambda m, x: m.d(m.d(x).relu()), d=conv(12, 12))),
    "a norm called twice": right(images(lambda m, x: m.n(m.d(m.n(x))), d=conv(12, 12), n=nn.BatchNorm2d(12))),
    "one layer under two names": right(images(lambda m, x: m.e(m.d(x)), **dict.fromkeys("de", conv(12, 12)))),
    "embedding tied to the decoder": right(
        whole(lambda m, x: F.linear(m.b(m.a(x)).relu(), m.a.weight), TOKENS, a=nn.Embedding(7, 12), b=nn.Linear(12, 12)), "a"
    ),
    "embedding tied to a decoder": right(
        whole(lambda m, x: m.e(m.b(m.d(x)).relu()), TOKENS, **sharing_weights(nn.Embedding(7, 12), nn.Linear(12, 7)), b=nn.Linear(12, 12)), "d"
    ),
    "a module in a dict and a list": right(
        images(lambda m, x: sum(m.layers["d"](x) * s for s in m.scales), reads=7,
               layers=nn.ModuleDict({"d": conv(12, 7)}), scales=nn.ParameterList([parameter(7, 1, 1), parameter(7, 1, 1)])),
        "a", "odd.layers.d", "b",
    ),
    # --- what eval mode switches off ---
    "dropout": right(images(lambda m, x: m.d(x), d=nn.Dropout(0.5))),
    "dropout2d": right(images(lambda m, x: m.d(x), d=nn.Dropout2d(0.5))),
    "stochastic depth": right(images(lambda m, x: x + m.d(m.e(x)), d=DropPath(0.5), e=conv(12, 12))),
    # --- attention over tokens ---
    "attention, sizes by attributes": right(attend(Attention()), *ATTENTION),
    "attention, sizes by C // heads": right(attend(ExplicitAttention()), *ATTENTION),
    "attention, sizes open": right(attend(OpenAttention()), *ATTENTION),
    "attention, 3 heads like q, k, v": right(tokens(Attention(12, 3)), *ATTENTION),
    "attention with scale": right(attend(ScaledAttention()), *ATTENTION),
    "attention with a causal mask": right(attend(CausalAttention(future=torch.ones(6, 6, dtype=torch.bool).triu(1))), *ATTENTION),
    "attention with relative positions": right(
        attend(BiasedAttention(table=parameter(11, 4), index=torch.arange(6)[:, None] - torch.arange(6) + 5)), *ATTENTION
    ),
    "attention with talking heads": right(attend(TalkingHeads(talk=nn.Linear(4, 4))), *ATTENTION),  # unsure
    "attention with normed q and k": right(attend(NormedAttention(q_norm=nn.LayerNorm(4), k_norm=nn.LayerNorm(4))), *ATTENTION, zeros=False),
    "attention over channels": right(attend(ChannelAttention(temperature=parameter(4, 1, 1))), *ATTENTION),
    "linear attention": right(attend(LinearAttention()), *ATTENTION),
    "rotary attention": right(attend(RotaryAttention(cos=ramp(6, 4), sin=ramp(6, 4))), *ATTENTION),  # unsure
    "attention, separate q, k, v": right(attend(Separate()), "a", "odd.q", "odd.proj", "b"),
    "attention, grouped queries": right(attend(GroupedQueries(kv_heads=2)), "a", "odd.q", "odd.proj", "b"),  # unsure
    "attention, one head": right(attend(SingleHead(scale=0.25)), "a", "odd.q", "odd.v", "odd.proj", "b"),
    "attention, one fused head": right(attend(SingleHeadFused()), "a", "odd.v", "odd.proj", "b"),
    "attention in windows": right(
        images(lambda m, x: m.d(x.permute(0, 2, 3, 1)), b=nn.Linear(12, 6), d=WindowAttention(window=4, attention=Attention(12, 3))),
        "a", "odd.d.attention.qkv", "odd.d.attention.proj", "b",
    ),
    "attention with class and register tokens": right(
        attend(PrefixTokens(cls=parameter(1, 1, 16), registers=parameter(1, 2, 16), positions=parameter(1, 9, 16), attention=Attention())),
        "a", "odd.attention.qkv", "b",
    ),
    "attention by nn.MultiheadAttention": right(
        tokens(lambda m, x: m.d(x, x, x, need_weights=False)[0], d=nn.MultiheadAttention(12, 3, batch_first=True)), "a", "b"
    ),  # unsure: torch ties embed_dim to the heads
    "attention by nn.MultiheadAttention, tokens first": right(
        tokens(lambda m, x: m.d(*[x.transpose(0, 1)] * 3)[0].transpose(0, 1), d=nn.MultiheadAttention(12, 3)), "a", "b"
    ),  # unsure
    "nn.TransformerEncoderLayer": right(
        tokens(lambda m, x: m.d(x), d=nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)), "odd.d.linear1", "b", zeros=False
    ),  # unsure: its fast path is one operation
    "attention pooling": right(
        tokens(lambda m, x: F.scaled_dot_product_attention(m.q.expand(x.shape[0], -1, -1), m.k(x), x, scale=0.5),
               q=parameter(1, 2, 5), k=nn.Linear(12, 5)), "a", "b"
    ),
    "non-local block": right(images(non_local, reads=7, q=conv(12, 5), k=conv(12, 5), v=conv(12, 7)), "a", "odd.q", "odd.v", "b"),
    # --- recurrence, Fourier, complex numbers ---
    "lstm": refused(tokens(lambda m, x: m.d(x)[0], reads=7, d=nn.LSTM(12, 7, batch_first=True))),
    "gru": refused(tokens(lambda m, x: m.d(x)[0], reads=7, d=nn.GRU(12, 7, batch_first=True))),
    "fft over channels": refused(images(lambda m, x: torch.fft.fft(x, dim=1).real)),
    "fft over space": refused(images(lambda m, x: torch.fft.fft2(x).real)),  # unsure: each channel for itself
    "a filter of frequencies": refused(
        images(lambda m, x: torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(m.w), s=(8, 8)), w=parameter(12, 8, 5, 2))
    ),  # unsure: a global filter network
    "complex numbers": refused(images(lambda m, x: torch.view_as_real(torch.complex(x, x.relu()) ** 2).sum(-1))),  # unsure: pointwise
    "pairs of channels as complex numbers": refused(
        tokens(lambda m, x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2))
    ),  # unsure: pairs can go
    # --- decisions by values ---
    "a branch by a value": refused(images(branch_by_value), groups=()),
    "item": refused(images(lambda m, x: x * x.mean().item()), groups=()),
    "a number of tokens by a value": refused(tokens(lambda m, x: x[:, : 2 + int(x.sum() > 1e9)]), groups=()),
    "nonzero": refused(images(lambda m, x: x * (x > 0).nonzero().shape[0]), groups=()),
    # --- writing in place ---
    "write into channels": refused(images(InPlacePart(k=4))),
    "add to channels": refused(images(InPlacePartAdd(k=4))),
    "index_put": refused(images(write_by_index)),
    "write into a room of zeros": refused(images(Room(size=15), reads=15)),
    "write into the middle of space": right(images(into_the_middle_of_space)),
    "write two values into one": right(images(write_two, d=conv(12, 12))),
    "write one value for all channels": right(images(lambda m, x: write_into_space(x.clone(), x.sum(1, keepdim=True)))),
    "write numbers of the code into space": refused(images(lambda m, x: write_into_space(x.clone(), ramp(1, 12, 8, 8)))),
    "write in another order": right(images(lambda m, x: write_into_space(x.new_zeros(x.shape), x.transpose(2, 3)))),
    "write across the channels": refused(images(write_across_channels), reason="written into a part"),
    "seen by a view from before": refused(images(seen_from_before, d=conv(12, 12)), "a", "odd.d"),
    "fill zeros_like": right(images(into_zeros_like)),
    "relu_": right(images(lambda m, x: x.clone().relu_())),
    "add_": right(images(lambda m, x: x.add_(m.d(x)), d=conv(12, 12))),
    "nn.ReLU in place": right(images(lambda m, x: m.d(x) + x, d=nn.ReLU(inplace=True))),
    # --- wrappers ---
    "a function of autograd": right(images(lambda m, x: Identity.apply(x))),
    "checkpoint": right(images(lambda m, x: checkpoint(m.d, x, use_reentrant=False), reads=7, d=conv(12, 7)), "a", "odd.d", "b"),
    "detach and clone": right(images(lambda m, x: x + (x.relu() - x).detach().clone())),
    "cast": right(images(lambda m, x: x.double().to(x.dtype))),
    # --- pooling and sampling ---
    "upsample": right(images(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))),
    "upsample to a size": right(images(lambda m, x: F.interpolate(x, size=(5, 7), mode="nearest"))),
    "grid_sample": right(
        images(lambda m, x: F.grid_sample(x, m.grid.expand(x.shape[0], -1, -1, -1), align_corners=False), grid=ramp(1, 4, 4, 2) - 1)
    ),
    "grid_sample where channels say": right(images(transformed_grid, where=conv(12, 2))),  # unsure
    "adaptive average pooling": right(images(nn.AdaptiveAvgPool2d((3, 5)))),
    "adaptive maximum pooling": right(images(nn.AdaptiveMaxPool2d(2))),
    "pooling of powers": right(images(nn.LPPool2d(2, 2))),
    "maximum pooling with places": right(images(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0])),
    # --- inputs and outputs ---
    "two outputs": right(whole(lambda m, x: (lambda y: (m.b(y), m.c(y)))(m.a(x)), a=conv(3, 12), b=conv(12, 6), c=conv(12, 2)), "a"),
    "a dict of outputs": right(
        whole(lambda m, x: (lambda y: {"mask": m.b(y), "box": [m.c(y.mean((2, 3)))]})(m.a(x)), a=conv(3, 12), b=conv(12, 6), c=nn.Linear(12, 2)), "a"
    ),
    "two inputs": right(
        whole(lambda m, x, y: m.b(m.a(x) * m.d(y).mean(1)[:, :, None, None]), (IMAGE, SEQUENCE), a=conv(3, 12), d=nn.Linear(12, 12), b=conv(12, 6)),
        "a",
    ),
    "token input with positions": right(
        whole(lambda m, x: m.c(m.b(m.a(x) + m.p(torch.arange(x.shape[1]))).relu()), TOKENS,
              a=nn.Embedding(7, 12), p=nn.Embedding(6, 12), b=nn.Linear(12, 6), c=nn.Linear(6, 2))
    ),
    "token input, summed in bags": refused(
        whole(lambda m, x: m.c(m.b(m.a(x)).relu()), TOKENS, a=nn.EmbeddingBag(7, 12, mode="sum"), b=nn.Linear(12, 6), c=nn.Linear(6, 2))
    ),
    "one-hot input": refused(
        whole(lambda m, x: m.c(m.b(F.one_hot(x, 7).to(m.b.weight.dtype) @ m.a).relu()), TOKENS,
              a=parameter(7, 12), b=nn.Linear(12, 6), c=nn.Linear(6, 2)), "a", "b", groups=()
    ),  # one_hot looks at values of the input
    "the residual stream is the output": refused(
        whole(lambda m, x: (lambda y: y + m.c(m.b(y).relu()))(m.a(x)), a=conv(3, 12), b=conv(12, 6), c=conv(6, 12)), reason="output"
    ),
    "no classes": refused(
        whole(lambda m, x: m.head((lambda y: y + m.c(m.b(y).relu()))(m.a(x)).mean((2, 3))),
              a=conv(3, 12), b=conv(12, 6), c=conv(6, 12), head=nn.Identity()), reason="output"
    ),
    "the input is added": refused(
        whole(lambda m, x: m.c(m.b(x + m.a(x)).relu()), a=conv(3, 3), b=conv(3, 6), c=conv(6, 2)), reason="input"
    ),
    "channels are shown beside the classes": refused(
        whole(lambda m, x: (lambda y: (m.c(m.b(y).relu()), y))(m.a(x)), a=conv(3, 12), b=conv(12, 6), c=conv(6, 2)), reason="output"
    ),
    "a whole block": right(
        images(lambda m, x: x + m.s * m.up(F.gelu(m.down(m.n(m.d(x).permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
               d=conv(12, 12, 3, padding=1, groups=12), n=nn.LayerNorm(12), down=nn.Linear(12, 20), up=nn.Linear(20, 12), s=parameter(12, 1, 1)),
        "a", "odd.down", "b", zeros=False,
    ),
}  # fmt: skip
