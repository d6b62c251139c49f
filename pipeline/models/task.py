"""What a pass over the data computes with networks: sums of a micro-batch that add up over all rows.

A task owns its networks and is sent to the workers as it is. Where they run is the worker's affair: it *places* each of them, whole on
its device or in rows on several (`models.sharding`), and the task uses what it gets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pipeline.models.sharding import Network, Stored, Take, whole

CHECKED_ROWS = 3
"""At most so many are given to `Task.check`."""


class Place(Protocol):
    """Puts a network where it can be called, in eval mode. Only the named parameters get gradients: in each backward, as soon as one is
    known, `take` is told, and nobody keeps it."""

    def __call__(self, network: Network, names: Collection[str] = (), take: Take | None = None, /) -> nn.Module: ...


class Task:
    """One micro-batch -> additive sums."""

    nested: frozenset[str] = frozenset()
    """Sums that are also kept over every 2nd, 4th ... unit (data.units.STRIDES), to see how they settle."""
    segments: Mapping[str, tuple[int, ...]] = {}
    """Sums whose parts differ in scale: sizes of the parts of their last dimension."""

    def place(self, place: Place) -> None:
        """Let `place` put the networks where they run; before anything else."""

    def to(self, device: torch.device, memory_format: torch.memory_format = torch.preserve_format) -> None:
        """Place the networks whole on one device."""
        self.place(partial(on_device, device, memory_format))

    def check(self, images_NCHW: Tensor, labels_N: Tensor) -> None:
        """Raise what makes every sum wrong. Called once by each worker, with its first few rows, before anything counts."""

    def __call__(self, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, Tensor]:
        """Float or int64 sums that add up over micro-batches; tensors that nobody else holds, since they are added to in place."""
        raise NotImplementedError

    def collect(self) -> dict[str, Tensor]:
        """Sums that the task has added up by itself since the last call, over the micro-batches of a unit. Of parameters in rows, this
        worker's rows."""
        return {}

    def idle(self, image_1CHW: Tensor) -> None:
        """Join in what workers do together for a micro-batch that the others have and this one has not."""
        self(image_1CHW, image_1CHW.new_zeros(1, dtype=torch.int64))


def add_(sums: dict[str, Tensor], addend: Mapping[str, Tensor]) -> None:
    """Add in place."""
    for name, value in addend.items():
        if name in sums:
            sums[name] += value
        else:
            sums[name] = value


def on_device(
    device: torch.device,
    memory_format: torch.memory_format,
    network: Network,
    names: Collection[str] = (),
    take: Take | None = None,
) -> nn.Module:
    """A `Place`: whole, on one device."""
    model = whole(network) if isinstance(network, Stored) else network
    model.to(device, memory_format=memory_format)  # type: ignore[call-overload]
    model.eval().requires_grad_(False)
    if take is not None:
        hand_over(model, names, take)
    return model


def hand_over(model: nn.Module, names: Collection[str], take: Take) -> list[RemovableHandle]:
    """From now on `take` gets the gradients of these parameters, which the parameters then lose."""
    found = {name: parameter for name, parameter in model.named_parameters() if name in names}
    return [
        parameter.requires_grad_().register_post_accumulate_grad_hook(partial(_hand_over, name, take))
        for name, parameter in found.items()
    ]


def _hand_over(name: str, take: Take, parameter: Tensor) -> None:
    grad, parameter.grad = parameter.grad, None
    assert grad is not None
    take(name, (grad,))
