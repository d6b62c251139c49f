"""Which module runs, and the torch functions that it calls by itself, `x @ self.weight`: found again by counting them.

The tracer counts them when it notes a place, and whoever puts something there later counts in the same way: functions, not
attributes, called while this module is the innermost that runs. What hooks call is hidden from both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

Place = tuple[str, int, str]
"""(module, the how-many-eth torch function that it calls, its name: a module may run other code at another time)."""


@dataclass(slots=True)
class Running:
    """A module that is running."""

    path: str
    calls: int = 0
    """Torch functions that its code has called so far."""


@contextmanager
def each_module(
    model: nn.Module,
    enter: Callable[[str, nn.Module, tuple[Any, ...]], object],
    leave: Callable[[str, Any], object],
) -> Iterator[None]:
    """Inside, enter(path, module, inputs) is called before each module runs, and leave(path, output) after it, also when it
    is left by an exception."""

    def before(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        enter(path, module, inputs)

    def after(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        leave(path, output)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(before, path)))
        handles.append(module.register_forward_hook(partial(after, path), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Calls(TorchFunctionMode):
    """Counts the torch functions that each module calls.

    Args:
        stack: modules that are running, the innermost last; somebody else pushes and pops them.
    """

    def __init__(self, stack: Sequence[Running]) -> None:
        super().__init__()
        self.stack = stack

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):  # x.shape, x.dtype
            return self.attribute(func, args, kwargs or {})
        running = self.stack[-1]
        running.calls += 1
        return self.call((running.path, running.calls - 1, name), func, args, kwargs or {})

    def call(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)

    def attribute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return func(*args, **kwargs)


@contextmanager
def in_calls(
    model: nn.Module, places: Mapping[Place, Mapping[int, Any]], gate: Callable[[Tensor, Any], Tensor]
) -> Iterator[None]:
    """Inside, tensor argument i of the call at a place is replaced by gate(argument, places[place][i])."""
    stack = [Running("")]
    if not places:
        yield
        return
    with (
        each_module(model, lambda path, *_: stack.append(Running(path)), lambda *_: stack.pop()),
        _Gates(stack, places, gate),
    ):
        yield


class _Gates(Calls):
    def __init__(
        self,
        stack: Sequence[Running],
        places: Mapping[Place, Mapping[int, Any]],
        gate: Callable[[Tensor, Any], Tensor],
    ) -> None:
        super().__init__(stack)
        self.places = places
        self.gate = gate

    def call(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        wanted = self.places.get(place)
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
