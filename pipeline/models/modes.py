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
    """Dictionaries in which modules keep computed tensors from one forward pass to the next, such as LeViT's
    `attention_bias_cache`. They are known by their name: a table of constants may look the same."""
    for module in model.modules():
        for name, value in vars(module).items():
            tensors = isinstance(value, dict) and value and all(isinstance(item, Tensor) for item in value.values())
            if tensors and "cache" in name:
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
