"""Policies: what training does beside following the loss. Penalties, gates and masks are policies; so is counting movement.

A policy acts at four points of a step, on every rank with the same values: gradients are those of the global batch, and so the same
everywhere. What must be decided once is decided by rank 0 and sent to all (`agreed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.pruning.masks import masks_sha256, not_zero_where_masked, pack, unpack

NEAR_ZERO = 0.01
"""A weight below this fraction of the largest of its layer is nearly zero."""


@dataclass(frozen=True)
class Training:
    """The training that a policy takes part in, on one rank."""

    model: nn.Module
    """In training, on its device; the policy changes its parameters in place."""
    optimizer: Optimizer
    num_steps: int
    lr_sum: float
    """Of the learning rates of all its updates."""
    rank: int = 0
    world_size: int = 1
    seed: int = 0

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By the name in the state_dict; a tied one under its first."""
        return dict(self.model.named_parameters())

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device


class Policy:
    """Does nothing; each kind overrides what it needs. Made by a `MakePolicy` in the worker that trains."""

    def before_forward(self, step: int) -> None:
        """Update `step` (0, 1 ...) begins; parameters may be changed for the time of this forward and backward."""

    def after_backward(self, step: int) -> None:
        """Gradients are there, before they are clipped."""

    def after_update(self, step: int, lr: float) -> None:
        """The optimizer has made update `step` with this learning rate."""

    def settle_(self, model: nn.Module) -> None:
        """Training is over: give its result, the averaged weights or the last ones, the zeros that the policy promises."""

    def masks(self) -> Mapping[str, Tensor]:
        """Parameter -> bool, True = keep, of the masks in force; none by default."""
        return {}

    def require_zeros(self) -> None:
        """Before a checkpoint is written: AssertionError if the parameters lack the zeros that hold at this step."""

    def shared(self) -> Mapping[str, Tensor]:
        """What is the same on every rank, or they would no longer train one network; looked at with each checkpoint."""
        return self.masks()

    def figures(self) -> dict[str, float]:
        """What the history says about the policy."""
        return {}

    def statistics(self) -> dict[str, Tensor]:
        """What later stages read, by "kind/name"; on the CPU."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Plain values: all that the next step depends on and that is not in the model or the optimizer."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over `state_dict()`, of which the tensors come on the CPU."""


MakePolicy = Callable[[Training], Policy]
"""Picklable: `partial(GroupLasso, graph=graph, strength=1e-4)`."""


class Policies(Policy):
    """Several policies, one after the other in the given order."""

    def __init__(self, parts: Sequence[Policy]) -> None:
        self.parts = parts

    def before_forward(self, step: int) -> None:
        for part in self.parts:
            part.before_forward(step)

    def after_backward(self, step: int) -> None:
        for part in reversed(self.parts):  # what was changed last is given back first
            part.after_backward(step)

    def after_update(self, step: int, lr: float) -> None:
        for part in self.parts:
            part.after_update(step, lr)

    def settle_(self, model: nn.Module) -> None:
        for part in self.parts:
            part.settle_(model)

    def masks(self) -> Mapping[str, Tensor]:
        return {name: mask for part in self.parts for name, mask in part.masks().items()}

    def shared(self) -> Mapping[str, Tensor]:
        return {f"{i}/{name}": value for i, part in enumerate(self.parts) for name, value in part.shared().items()}

    def require_zeros(self) -> None:
        for part in self.parts:
            part.require_zeros()

    def figures(self) -> dict[str, float]:
        return {name: value for part in self.parts for name, value in part.figures().items()}

    def statistics(self) -> dict[str, Tensor]:
        return {name: value for part in self.parts for name, value in part.statistics().items()}

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


class Movement(Policy):
    """Sums -w * g of every weight over the steps, before each update: how far training moves it away from zero.

    Source: Sanh, Wolf, Rush, "Movement Pruning", NeurIPS 2020, section 4; the learning rate is left out there, too.
    """

    def __init__(self, training: Training) -> None:
        # Gradients are the same on every rank: one of them sums.
        self.parameters = training.parameters if training.rank == 0 else {}
        self.sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.parameters.items()}

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.sums[name].addcmul_(parameter, parameter.grad, value=-1)

    def statistics(self) -> dict[str, Tensor]:
        return {f"movement/{name}": value.cpu() for name, value in self.sums.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, sums in self.sums.items():
            sums.copy_(state["sums"][name])


# --- masks that all ranks share ---------------------------------------------------------------------------------------


class RanksDiffer(RuntimeError):
    """Two ranks hold different masks or gates: what they train is no longer one network."""


def agreed(decide: Callable[[], Mapping[str, Tensor]], training: Training) -> dict[str, Tensor]:
    """Masks that rank 0 decides, on every rank's device. Called at the same step on all; `decide` runs on rank 0 alone."""
    message: list[Any] = [None, None]  # packed masks with their hash, or the error
    if training.rank == 0:
        try:
            masks = {name: mask.cpu() for name, mask in decide().items()}
            message[0] = ({n: (pack(m), tuple(m.shape)) for n, m in masks.items()}, masks_sha256(masks))
        except Exception as error:
            if training.world_size == 1:
                raise
            message[1] = error  # the others wait for masks: they get the error instead
    if training.world_size > 1:
        dist.broadcast_object_list(message, src=0, device=training.device)
    found, failure = message
    if failure is not None:
        raise failure
    packed, sha256 = found
    masks = {name: unpack(*values) for name, values in packed.items()}
    if masks_sha256(masks) != sha256:
        raise RanksDiffer(
            f"rank {training.rank} received masks with another hash than rank 0 has sent ({sha256[:12]})."
        )
    return {name: mask.to(training.device) for name, mask in masks.items()}


def require_agreement(shared: Mapping[str, Tensor], rank: int, world_size: int) -> None:
    """Every rank has the same bits of what is shared; costs one hash of it. Raises RanksDiffer on all ranks."""
    if world_size == 1:
        return
    hashes: list[Any] = [None] * world_size
    dist.all_gather_object(hashes, _sha256(shared))
    if len(set(hashes)) > 1:
        shown = ", ".join(f"rank {i}: {sha256[:12]}" for i, sha256 in enumerate(hashes))
        raise RanksDiffer(
            f"the ranks hold different masks or gates ({shown}). A worker's memory is damaged, or its version or kind of device is another: "
            "start again from the last checkpoint, on workers of one kind."
        )


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_zeros(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """AssertionError, with the first such parameter, if one is not zero where its mask is False."""
    wrong = not_zero_where_masked(parameters, masks)
    assert not wrong, f"{wrong[0]} is not zero where its mask says so (and {len(wrong) - 1} more)"


# --- figures ----------------------------------------------------------------------------------------------------------


Shares = list[float]
"""[share that is exactly zero or masked, share that is nearly zero, these included]."""


@torch.no_grad()
def shares_of_zeros(parameters: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> tuple[Shares, dict[str, Shares]]:
    """Of all weights of two dimensions and more, and of each by name."""
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.dim() < 2:
            continue
        size = parameter.abs()
        if name in masks:
            size = size.masked_fill(~masks[name], 0)
        exact, near = (size == 0).double().mean(), (size <= NEAR_ZERO * size.max()).double().mean()
        found[name] = torch.stack([exact, near])
    if not found:
        return [0.0, 0.0], {}
    table = torch.stack(list(found.values())).tolist()  # one transfer from the device
    layers, numel = dict(zip(found, table, strict=True)), {name: parameters[name].numel() for name in found}
    whole = [sum(shares[i] * numel[name] for name, shares in layers.items()) / sum(numel.values()) for i in (0, 1)]
    return whole, layers
