"""Small residual networks: blocks of a ResNet, of a ConvNeXt, and some that only look as if they could go."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Basic(nn.Module):
    """ResNet's: relu(x + branch), the sum written into the branch."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_out)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_out)
        self.shortcut = nn.Conv2d(num_in, num_out, 1) if num_in != num_out else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        out += x if self.shortcut is None else self.shortcut(x)
        return out.relu_()


class Scaled(nn.Module):
    """ConvNeXt's: x + scale * branch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.expand = nn.Conv2d(width, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, width, 1)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.scale * self.project(torch.tanh(self.expand(self.conv(x)))))


class Watched(Basic):
    """Keeps its branch for others to read."""

    def forward(self, x: Tensor) -> Tensor:
        self.branch = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (x + self.branch).relu()


class Network(nn.Module):
    """A stem, blocks, a mean over positions and a head; for images of 4 x 4."""

    def __init__(self, *blocks: nn.Module, width: int = 8, positive: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, 5)
        self.positive = positive

    def forward(self, images_NCHW: Tensor) -> Tensor:
        x = self.stem(images_NCHW)
        x = self.blocks(x.relu() if self.positive else x)
        for block in self.blocks:
            if isinstance(block, Watched):
                x = x + block.branch.relu()
        return self.head(x.mean((2, 3)))


def resnet() -> nn.Module:
    """Four basic blocks; the second widens, so that three can go. Weights hide nothing."""
    torch.manual_seed(0)
    return rough(Network(Basic(8, 8), Basic(8, 16), Basic(16, 16), Basic(16, 16), width=16))


def rough(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.uniform_(0.5, 1.5)
    return model.eval()


IMAGE = torch.zeros(1, 3, 4, 4)
OPTIONAL = ["blocks.0", "blocks.2", "blocks.3"]
"""Of `resnet`."""
