"""Torch functions that a module calls by itself, `x @ self.weight`: found again by counting its calls.

The tracer counts them when it notes a place, and whoever puts something there later counts in the same way: functions, not
attributes, called while this module is the innermost that runs. What hooks call is hidden from both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

Place = tuple[str, int, str]
"""(module, the how-many-eth torch function that it calls, its name: a module may run other code at another time)."""


def is_call(func: Any) -> bool:
    """A function, not an attribute (x.shape, x.dtype)."""
    return getattr(func, "__name__", "") not in ("__get__", "__set__")


def in_calls(
    modules: Mapping[str, nn.Module],
    places: Mapping[Place, Mapping[int, Any]],
    gate: Callable[[Tensor, Any], Tensor],
) -> tuple[TorchFunctionMode, list[RemovableHandle]]:
    """A mode in which tensor argument i of the call at a place is replaced by gate(argument, places[place][i]).

    `modules`: all of the network by name.
    """
    mode = _Calls(places, gate)

    def enter(name: str) -> Callable[[nn.Module, object], None]:
        return lambda _module, _inputs: mode.running.append([name, 0])

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        mode.running.pop()

    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    return mode, handles


class _Calls(TorchFunctionMode):
    def __init__(self, places: Mapping[Place, Mapping[int, Any]], gate: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.places = places
        self.gate = gate
        self.running: list[list[Any]] = [["", 0]]
        """Name of each running module, and how many torch functions it has called."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_call(func):
            frame = self.running[-1]
            wanted = self.places.get((frame[0], frame[1], getattr(func, "__name__", "")))
            frame[1] += 1
            if wanted:
                with torch._C.DisableTorchFunction():
                    args, kwargs = self._gated(args, kwargs, wanted)
        return func(*args, **kwargs)

    def _gated(self, args: Any, kwargs: Any, wanted: Mapping[int, Any]) -> Any:
        values, spec = tree_flatten((args, kwargs))
        tensors = [i for i, value in enumerate(values) if isinstance(value, Tensor)]
        for operand, what in wanted.items():
            values[tensors[operand]] = self.gate(values[tensors[operand]], what)
        return tree_unflatten(values, spec)
