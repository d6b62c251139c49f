"""Residual blocks: modules that hand on their first input with something added, found while the code runs.

The sum may be one of several (a transformer's block has two branches), and an activation may follow it (a ResNet's).
Whether such a module can go is no question of its code: relu(x) is x only where nothing is negative, and a branch may be
used elsewhere, too. Trial cuts decide that (`pruning.trials`).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.models.calls import Place, each_module
from pipeline.models.graph import Block, Branch
from pipeline.models.modes import eval_mode
from pipeline.models.trace.tracer import PythonCalls, Trace, module_stack

ADDITIONS = frozenset({"add", "add_", "__add__", "__iadd__", "__radd__"})

Sum = tuple[Tensor, tuple[Branch, ...]]
"""A value, and what has been added to the input to make it. The value is held, so that no other can take its id."""


@torch.no_grad()
def find_blocks(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Block, ...]:
    """Modules of `model` that may be optional, in running order: of nested ones the innermost.

    Each was called once and shares none of its tensors with others.

    Args:
        inputs: what the network accepts, best of several rows: what is added to one row alone need not be computed from it.
    """
    finder = _Finder(model)
    with eval_mode(model), torch.random.fork_rng(devices=[]):
        finder.run(inputs)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names_of: dict[int, list[str]] = {}
    for name, tensor in (*parameters.items(), *model.named_buffers(remove_duplicate=False)):
        names_of.setdefault(id(tensor), []).append(name)
    found: dict[str, Block] = {}
    for path, branches in finder.found.items():
        own = [names for names in names_of.values() if any(_inside(name, path) for name in names)]
        alone = all(_inside(name, path) for names in own for name in names)
        once = all(finder.calls[name] == 1 for name in (path, *(branch.module for branch in branches)))
        tensors = tuple(name for names in own for name in names)
        if path and alone and once and not parameters.keys().isdisjoint(tensors):
            found[path] = Block(path, tensors, branches)
    return tuple(block for path, block in found.items() if not any(_inside(other, path) for other in found))


def _inside(name: str, path: str) -> bool:
    return name.startswith(f"{path}.")


@dataclass(frozen=True, slots=True)
class _Running:
    """Of a module that runs: its first input, and the sums of that with something else, by id."""

    x: Tensor
    sums: dict[int, Sum]


class _Finder(PythonCalls):
    """Follows the first input of every running module through the sums that the code makes of it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(Trace(model), sizes=False)
        self.model = model
        self.calls: Counter[str] = Counter()
        self.found: dict[str, tuple[Branch, ...]] = {}
        self._running: list[_Running | None] = []
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def run(self, inputs: tuple[Tensor, ...]) -> None:
        with each_module(self.model, self._enter, self._leave), module_stack(self.model, self.trace), self:
            self.model(*inputs)

    def call(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = super().call(place, func, args, kwargs)
        if isinstance(out, Tensor):
            tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
            for running in self._running:
                if running is not None and out.numel() == running.x.numel():
                    self._follow(running.sums, place, tensors, out)
        return out

    def _follow(self, sums: dict[int, Sum], place: Place, tensors: list[Tensor], out: Tensor) -> None:
        path, index, name = place
        known = [sums.get(id(tensor)) for tensor in tensors]
        if name in ADDITIONS and len(tensors) == 2 and known.count(None) == 1:
            branch = known.index(None)
            _, before = known[1 - branch] or (out, ())
            if tensors[branch].shape == out.shape and id(tensors[branch]) not in self._own:
                sums[id(out)] = (out, (*before, Branch(path, (index, branch, name))))
        elif len(tensors) == 1 and known[0] is not None and known[0][1]:  # an activation of a sum, or a view
            sums[id(out)] = (out, known[0][1])

    def _enter(self, _path: str, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs and isinstance(inputs[0], Tensor) else None
        self._running.append(_Running(x, {id(x): (x, ())}) if x is not None else None)

    def _leave(self, path: str, output: Any) -> None:
        running = self._running.pop()
        self.calls[path] += 1
        if running is not None and isinstance(output, Tensor) and output.shape == running.x.shape:
            _, branches = running.sums.get(id(output), (output, ()))
            if branches:
                self.found[path] = branches
