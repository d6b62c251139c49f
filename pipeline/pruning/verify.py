"""Verification: the smaller network against the masked dense one, on real rows.

A cut network and the dense network whose removed channels contribute nothing compute the same function; what differs
beyond rounding is a mistake in the graph or in the surgery, and is never handed on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.modes import eval_mode


class CutMismatch(RuntimeError):
    """The cut network computes something else than the masked dense one."""


_REMEDY = (
    "Do not use the cut network. Trace the network again with pipeline.trace, which freezes what trial cuts cannot "
    "explain, at the input size that it is used at, and plan anew; if it persists, freeze the groups around the first "
    "layer that differs with Graph.without."
)


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two networks are apart on the same rows."""

    max_abs: float
    """Largest absolute difference of an output element."""
    max_rel: float
    """The same, relative to the largest absolute value of the reference's output; over several outputs, the worst."""
    rows: int
    """Rows compared."""

    def require(self, tolerance: float = 1e-4) -> Difference:
        """Itself, if `max_rel` is at most `tolerance`; float32 rounding stays about 100 times below the default.

        Raises:
            CutMismatch: it is more, or not a number.
        """
        if not self.max_rel <= tolerance:  # written so that NaN fails too
            raise CutMismatch(
                f"the cut network differs from the masked dense one on {self.rows} rows: max_abs {self.max_abs:.3g}, "
                f"max_rel {self.max_rel:.3g}, allowed {tolerance:.3g}. {_REMEDY}"
            )
        return self


@torch.no_grad()
def verify(cut: nn.Module, masked: nn.Module, images: Tensor | tuple[Tensor, ...]) -> Difference:
    """Run both networks in eval mode on the same rows and compare all outputs. Modes are put back afterwards.

    Args:
        cut: the smaller network.
        masked: the reference, see `reference.mask`.
        images: float [N, ...], N >= 1; a tuple for networks of several inputs. Moved to each network's device.

    Raises:
        CutMismatch: the outputs have other shapes or another number.
    """
    inputs = images if isinstance(images, tuple) else (images,)
    if not inputs or inputs[0].shape[0] == 0:
        raise ValueError("verify needs at least one row: an empty batch compares nothing and would always pass.")
    with eval_mode(cut), eval_mode(masked):
        ours = list(output_tensors(cut(*_on_device(cut, inputs))))
        reference = list(output_tensors(masked(*_on_device(masked, inputs))))
    return compare(ours, reference, rows=inputs[0].shape[0])


def compare(ours: list[Tensor], reference: list[Tensor], *, rows: int) -> Difference:
    """Largest differences over lists of outputs. An all-zero reference allows no difference at all."""
    shapes, wanted = [tuple(t.shape) for t in ours], [tuple(t.shape) for t in reference]
    if shapes != wanted:
        raise CutMismatch(f"the cut network's outputs have shapes {shapes}, the dense one's {wanted}. {_REMEDY}")
    if not any(tensor.numel() for tensor in reference):
        raise CutMismatch("the networks return no tensor with elements: nothing can be compared, so nothing is proved.")
    worst_abs, worst_rel = 0.0, 0.0
    for x, y in zip(ours, reference, strict=True):
        if y.numel() == 0:
            continue
        y = y.double()
        difference = float((x.to(y.device).double() - y).abs().max())
        scale = float(y.abs().max())
        relative = difference / scale if scale > 0 else (math.inf if difference > 0 else difference)
        worst_abs, worst_rel = _larger(worst_abs, difference), _larger(worst_rel, relative)
    return Difference(worst_abs, worst_rel, rows)


def _larger(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _on_device(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    first = next(iter(model.parameters()), None)
    return inputs if first is None else tuple(tensor.to(first.device) for tensor in inputs)


def output_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of a network's output in a fixed order: nested tuples, lists, mappings and dataclasses are opened."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from output_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from output_tensors(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from output_tensors(getattr(output, field.name))
