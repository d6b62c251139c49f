"""States of a network for the time of a measurement: eval mode, nothing cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode again outside."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in training:
            module.training = mode


def caches(model: nn.Module) -> Iterator[dict[Any, Tensor]]:
    """Dictionaries in which modules keep computed tensors from one forward pass to the next (LeViT's attention biases)."""
    for module in model.modules():
        internal = (module._parameters, module._buffers)
        for value in vars(module).values():
            computed = isinstance(value, dict) and value and not any(value is own for own in internal)
            if computed and all(
                isinstance(item, Tensor) and not isinstance(item, nn.Parameter) for item in value.values()
            ):
                yield value


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Inside, whatever modules have cached is gone and computed anew; afterwards it is as before."""
    stored = [(cache, dict(cache)) for cache in caches(model)]
    for cache, _ in stored:
        cache.clear()
    try:
        yield
    finally:
        for cache in list(caches(model)):
            cache.clear()
        for cache, values in stored:
            cache.update(values)
