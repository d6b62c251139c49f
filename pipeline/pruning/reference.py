"""The masked reference: the dense network as it computes when the removed channels are not there.

While it runs, labels go along (`models.trace`), so each operation knows which positions of its operands are removed. A
contraction reads zeros there; an operation that takes a statistic over channels (LayerNorm, a softmax over channels) takes
it over those that are kept. Whatever the removed channels still compute (a sigmoid makes 0.5 of 0), nothing sees it. The
branches of a removed block are zeros where they enter their sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from pipeline.models.calls import Place, in_calls
from pipeline.models.modes import uncached
from pipeline.models.trace.labels import Ids, Label, Slots
from pipeline.models.trace.rules import axes_of
from pipeline.models.trace.table import RULES, Call, find, tensors_in
from pipeline.models.trace.tracer import Operations, PythonCalls, Trace, module_stack
from pipeline.pruning.plan import Plan
from pipeline.pruning.surgery import check_plan
from pipeline.pruning.verify import CutMismatch

NORMS = {name for name, rule in RULES.items() if rule.kind == "norm"}
Removed = dict[tuple[str, int], NDArray[np.bool_]]
"""(tensor, dimension) -> which of its entries are removed."""


def mask(model: nn.Module, plan: Plan) -> Masked:
    """`model` without the contribution of the removed channels, all shapes as they are: the reference of a cut.

    Raises:
        PlanMismatch: the plan was made for another network.
    """
    check_plan(model, plan)
    return Masked(model, plan)


class Masked(nn.Module):
    """Runs the dense network, which it holds and does not change, as if the removed channels were not there."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model = model
        self._heads = plan.heads
        self._removed: Removed = {}
        for name, dims in plan.slices().items():
            for dim, kept in dims.items():
                gone = np.ones(plan.shapes[name][dim], dtype=bool)
                gone[kept.numpy()] = False
                self._removed[name, dim] = gone
        self._branches: dict[Place, dict[int, None]] = {}
        for branch in (branch for block in plan.blocks for branch in block.branches):
            call, argument, name = branch.call
            self._branches.setdefault((branch.module, call, name), {})[argument] = None

    @torch.no_grad()
    def forward(self, *inputs: Any, **named: Any) -> Any:
        trace = Trace(self.model, self._heads)

        def zeros(branch: Tensor, _: None) -> Tensor:
            result = torch.zeros_like(branch)
            trace.put(result, trace.label(branch))
            return result

        with (
            uncached(self.model),
            module_stack(self.model, trace),
            in_calls(self.model, self._branches, zeros),
            PythonCalls(trace, sizes=False),
            _KeptOnly(trace, self._removed),
        ):
            return self.model(*inputs, **named)


class _KeptOnly(Operations):
    """Runs each operation without the removed positions, where that makes a difference."""

    def __init__(self, trace: Trace, removed: Removed) -> None:
        super().__init__(trace)
        self._removed = removed
        self._gone: NDArray[np.bool_] = np.zeros(0, dtype=bool)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        _, rule = find(func._schema.name)
        if rule is not None and rule.kind == "contract":
            args, kwargs = tree_map_only(Tensor, self._zeroed, (args, kwargs))
        before = {}  # what the operation reads and writes over
        if func._schema.is_mutable and rule is not None and rule.kind in ("statistic", "norm"):
            before = {id(tensor): tensor.clone() for tensor in Call(func, args, kwargs, None).mutated}
        out = func(*args, **kwargs)
        call = Call(func, args, kwargs, out)
        operands = {id(x): (before.get(id(x), x), self.trace.label(x)) for x in call.tensors}
        self.follow(call)
        if self.trace.mixes:
            self._over_kept(call, operands, rule.resize if rule else None)
        return out

    def _zeroed(self, x: Tensor) -> Tensor:
        """Computed values with zeros in the place of removed channels; weights stay, since what they read is zero."""
        label = self.trace.label(x)
        if label is None or label.source is not None:
            return x
        result = x
        for axis, ids in label.axes.items():
            gone = self._is_gone(ids)
            if gone.any():
                result = result.index_fill(axis, torch.from_numpy(gone.nonzero()[0]).to(x.device), 0)
        if result is not x:
            self.trace.put(result, label)
        return result

    def _over_kept(
        self,
        call: Call,
        operands: dict[int, tuple[Tensor, Label | None]],
        resize: Callable[[dict[str, Any]], dict[str, Any]] | None,
    ) -> None:
        """Run the operation once more on what is kept, and write the results over those that it gave.

        Args:
            operands: id of each argument -> its value before the operation, and its label.
        """

        def taken(argument: Tensor) -> Tensor:
            x, label = operands[id(argument)]
            for axis, kept in self._kept(label, x).items():
                x = x.index_select(axis, kept)
            return x

        self._require_aligned(call, [operands[id(x)] for x in call.tensors])
        bound = tree_map_only(Tensor, taken, call.bound)
        args, kwargs = call.arguments(resize(bound) if resize else bound)
        for out, result in zip(call.outputs, tensors_in(call.func(*args, **kwargs)), strict=True):
            if call.get("dim") is not None and not out.dtype.is_floating_point and len(call.outputs) > 1:
                result = self._dense_positions(operands[id(call.tensors[0])], call["dim"], result)
            for axis, kept in self._kept(self.trace.label(out), out).items():
                shape = [*result.shape[:axis], out.shape[axis], *result.shape[axis + 1 :]]
                result = result.new_zeros(shape).index_copy_(axis, kept, result)
            out.copy_(result)

    def _dense_positions(self, operand: tuple[Tensor, Label | None], dim: int, found: Tensor) -> Tensor:
        """Positions of a maximum among what is kept, numbered as in the dense network: code that uses them is no statistic."""
        x, label = operand
        kept = self._kept(label, x).get(dim % x.dim())
        return found if kept is None else kept[found]

    def _require_aligned(self, call: Call, operands: list[tuple[Tensor, Label | None]]) -> None:
        """What stands at one position lies in one channel, whatever the rule has concluded: operands and results of one shape,
        and the scales, shifts and statistics of a norm.

        Raises:
            CutMismatch: along one axis, some lack other positions than others.
        """
        x, label = operands[0]
        for other, its in (*operands[1:], *((out, self.trace.label(out)) for out in call.outputs)):
            for axis, same in enumerate(_axes_in(call, x, other)):
                if other.shape[axis] == x.shape[same] > 1:
                    a, b = self._gone_along(label, same, x), self._gone_along(its, axis, other)
                    if not np.array_equal(a, b):
                        raise CutMismatch(
                            f"{call.name}: of axis {axis} of {tuple(other.shape)} other positions are removed than of the "
                            f"{tuple(x.shape)} values that they belong to"
                        )

    def _gone_along(self, label: Label | None, axis: int, x: Tensor) -> NDArray[np.bool_]:
        ids = label.axes.get(axis) if label else None
        return np.zeros(x.shape[axis], dtype=bool) if ids is None else self._is_gone(ids)

    def _kept(self, label: Label | None, x: Tensor) -> dict[int, Tensor]:
        """Axis -> positions that stay, of the axes that lose any."""
        found = {}
        for axis, ids in label.axes.items() if label else ():
            gone = self._is_gone(ids)
            if gone.any():
                found[axis] = torch.from_numpy((~gone).nonzero()[0]).to(x.device)
        return found

    def _is_gone(self, ids: Ids) -> NDArray[np.bool_]:
        """bool by position: does the slot belong to a removed channel?"""
        slots: Slots = self.trace.slots
        if len(self._gone) != slots.count:  # dimensions get their slots on first use
            parts = [self._removed.get(key, np.zeros(size, dtype=bool)) for key, size in slots.sizes()]
            self._gone = np.concatenate([np.zeros(1, dtype=bool), *parts])
        return self._gone[ids]


def _axes_in(call: Call, x: Tensor, other: Tensor) -> list[int]:
    """Axes of the first operand that the axes of another, or of a result, stand for; none where that is not plain."""
    if x.dim() == other.dim():
        return list(range(x.dim()))
    if call.name in NORMS:
        start = 1 if "batch_norm" in call.name or "group_norm" in call.name else x.dim() - other.dim()
        return list(range(start, start + other.dim())) if 0 < other.dim() < x.dim() else []
    if call.name == "aten::mv":  # the vector stands for the columns of the matrix, the result for its rows
        return [0 if any(other is out for out in call.outputs) else 1]
    rest = [axis for axis in range(x.dim()) if axis not in axes_of(call, x)]  # a reduction
    return rest if len(rest) == other.dim() else []
