"""One forward of the eager model under a dispatch mode, carrying labels beside the values; then classes become groups."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.models.graph import Contraction, Frozen, Graph, Group, Member, Site
from pipeline.models.trace.labels import Reason, Slots, compress, varying
from pipeline.models.trace.rules import RULES, Call, join

OWNERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
"""Modules whose first input carries the channels that their weight reads."""


class Trace:
    """What the rules see and write: labels of values, slots of parameters, contractions, consumers."""

    def __init__(self, model: nn.Module, batch: int) -> None:
        self.slots = Slots()
        self.batch = batch
        self.modules = dict(model.named_modules())
        self.positions: dict[str, int] = defaultdict(int)
        self.consumers: list[tuple[str, int, Tensor]] = []
        self.stack: list[str] = [""]
        self._names = {id(t): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
        self._transposed: dict[int, tuple[Tensor, str]] = {}
        self._labels: WeakIdKeyDictionary = WeakIdKeyDictionary()

    # values -------------------------------------------------------------------------------------------------------------

    def label(self, value: Any) -> Tensor | None:
        """The label of a value; a parameter or buffer with one axis larger than 1 has its own slots along it."""
        if not isinstance(value, Tensor):
            return None
        stored = self._labels.get(value)
        if stored is not None:
            return stored
        name = self.name_of(value)
        if name is None:
            return None
        axes = [axis for axis, size in enumerate(value.shape) if size > 1]
        if len(axes) != 1:
            return None
        slots = self.slots.of(name, axes[0], value.shape[axes[0]], "affine")
        view = [1] * value.dim()
        view[axes[0]] = -1
        return slots.view(view).expand(value.shape)

    def put(self, value: Tensor, label: Tensor | None) -> None:
        if label is not None:
            assert label.shape == value.shape
            self._labels[value] = label

    # parameters ---------------------------------------------------------------------------------------------------------

    def name_of(self, tensor: Any) -> str | None:
        return self._names.get(id(tensor))

    def name_of_transposed(self, tensor: Tensor) -> str | None:
        entry = self._transposed.get(id(tensor))
        return entry[1] if entry else None

    def note_transpose(self, source: Any, result: Tensor) -> None:
        name = self.name_of(source)
        if name is not None:
            self._transposed[id(result)] = (result, name)  # kept alive, so that its id stays its own

    def parameter(self, tensor: Tensor, role: str) -> Tensor | None:
        name = self.name_of(tensor)
        return None if name is None else self.slots.of(name, 0, tensor.shape[0], role)

    def is_own_module(self, weight: str) -> bool:
        """Is the weight used by the module that owns it, so that the module's input is what the weight reads?"""
        owner = weight.rpartition(".")[0]
        return self.stack[-1] == owner and isinstance(self.modules[owner], OWNERS)

    def tie_bias(self, bias: Tensor, out_slots: Tensor, call: Call) -> None:
        slots = self.parameter(bias, "affine")
        if slots is None:
            self.freeze(out_slots, call, "the bias is computed")
        else:
            self.slots.unite(slots, out_slots)

    def contraction(self, weight: str, positions: int) -> None:
        self.positions[weight] += positions

    def consumer(self, weight: str, axis: int, channels: Tensor) -> None:
        self.consumers.append((weight.rpartition(".")[0], axis, channels.clone()))

    # what rules conclude ------------------------------------------------------------------------------------------------

    def unite_elements(self, a: Tensor, b: Tensor) -> None:
        """Unite two labels of one shape, element by element, on storage of the channels' size."""
        axes = {*varying(a), *varying(b)}
        index = tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(a.dim()))
        self.slots.unite(a[index].clone(), b[index].clone())

    def unite_or_freeze(self, channels: Tensor, slots: Tensor, call: Call) -> None:
        """Tie slots to the channels they read; what reads no known channel stays, like the image's colours."""
        self.slots.unite(channels, slots)
        unknown = slots[channels == 0]
        if len(unknown):
            self.freeze(unknown, call, "reads the network's input, or values whose channels are not known")

    def join(self, call: Call) -> None:
        join(self, call)

    def freeze(self, label: Tensor, call: Call, text: str) -> None:
        axes = varying(compress(label))
        index = tuple(slice(None) if axis in axes else slice(0, 1) for axis in range(label.dim()))
        self.slots.freeze(label[index].clone(), Reason(str(call.func.overloadpacket), self._where(), text))

    def barrier(self, call: Call, text: str) -> None:
        """Freeze everything that reaches the operation: values with labels, and every dimension of its parameters."""
        for value in _tensors((call.args, call.kwargs)):
            label = self._labels.get(value)
            if label is not None:
                self.freeze(label, call, text)
            name = self.name_of(value) or self.name_of_transposed(value)
            if name is not None:
                shape = value.shape if self.name_of(value) else tuple(reversed(value.shape))
                for dim, size in enumerate(shape):
                    self.freeze(self.slots.of(name, dim, size, "affine"), call, text)

    def _where(self) -> str:
        frame: Any = sys._getframe(2)
        here, torch_dir = str(Path(__file__).parent), str(Path(torch.__file__).parent)
        while frame is not None:
            path = frame.f_code.co_filename
            if not path.startswith((here, torch_dir)) and "/pipeline/models/" not in path:
                return f"{self.stack[-1] or 'the network'} ({'/'.join(Path(path).parts[-3:])}:{frame.f_lineno})"
            frame = frame.f_back
        return self.stack[-1] or "the network"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


class _Mode(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        call = Call(func, args, kwargs or {}, out)
        name = func._schema.name
        name = name if name in RULES else name.removesuffix("_")  # in place: the same rule
        if name in {"aten::t", "aten::transpose"} and self.trace.name_of(args[0]):
            self.trace.note_transpose(args[0], out)
        elif name in RULES:
            RULES[name].apply(self.trace, call)
        elif torch.Tag.pointwise in func.tags:
            join(self.trace, call)
        elif any(True for _ in _tensors((args, kwargs))):
            self.trace.barrier(call, "there is no rule for this operation")
        return out


@contextmanager
def _module_stack(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Keep the path of the module that runs."""
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda m, a, name=name: trace.stack.append(name)))
        handles.append(module.register_forward_hook(lambda m, a, o: trace.stack.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def propagate(model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...]) -> Graph:
    """Channel groups of `model` by label propagation. The model stays as it is.

    Raises:
        ValueError: the network does not run on `example_inputs`.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    training = {name: module.training for name, module in model.named_modules()}
    trace = Trace(model, inputs[0].shape[0])
    model.eval()
    try:
        with _module_stack(model, trace), _Mode(trace):
            output = model(*inputs)
            for value in _tensors(list(output.values()) if isinstance(output, dict) else output):
                label = trace.label(value)
                if label is not None:
                    reason = Reason("output", "the network", "these channels are the network's output")
                    trace.slots.freeze(label.clone(), reason)
    except RuntimeError as error:
        raise ValueError(f"the network does not run on an input of {tuple(inputs[0].shape)}: {error}") from error
    finally:
        for name, module in model.named_modules():
            module.training = training[name]
    return _graph(model, trace, tuple(inputs[0].shape))


# --- classes become groups ----------------------------------------------------------------------------------------------


def _graph(model: nn.Module, trace: Trace, input_shape: tuple[int, ...]) -> Graph:
    class_of, reasons = trace.slots.classes()
    entries: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for tensor, dim, first, size in trace.slots.dimensions():
        for index, one in enumerate(class_of[first : first + size].tolist()):
            entries[one][tensor, dim].append(index)
    by_signature: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for one, members in entries.items():
        by_signature[tuple((key, len(indices)) for key, indices in members.items())].append(one)
    groups, frozen, names = [], [], set()
    for signature, classes in by_signature.items():
        name = _name([key for key, _ in signature], trace, names)
        stuck = [one for one in classes if one in reasons]
        free = [one for one in classes if one not in reasons]
        if stuck:
            reason = reasons[stuck[0]]
            frozen.append(Frozen(name, len(stuck), reason.operation, reason.where, reason.text))
        group = _group(name, free, entries, trace, class_of) if free else None
        if group is not None and not group.consumers:
            frozen.append(Frozen(name, len(free), "none", name, "no convolution or linear layer reads these channels"))
        elif group is not None:
            groups.append(group)
    shapes = {name: tuple(t.shape) for name, t in [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]}
    return Graph(
        groups=tuple(groups),
        frozen=tuple(frozen),
        contractions=tuple(Contraction(tensor, positions) for tensor, positions in trace.positions.items()),
        shapes=shapes,
        parameters=tuple(name for name, _ in model.named_parameters()),
        input_shape=input_shape,
    )


def _name(keys: list[tuple[str, int]], trace: Trace, taken: set[str]) -> str:
    """Module of the first producer; a group without one is named for its first reader."""
    producers = [tensor for tensor, dim in keys if trace.slots.roles[tensor, dim] == "out"]
    name = producers[0].rpartition(".")[0] if producers else f"{keys[0][0].rpartition('.')[0]}.input"
    unique, number = name, 2
    while unique in taken:
        unique, number = f"{name}#{number}", number + 1
    taken.add(unique)
    return unique


def _group(name: str, classes: list[int], entries: Any, trace: Trace, class_of: np.ndarray) -> Group:
    members = tuple(
        Member(tensor, dim, torch.tensor([entries[one][tensor, dim] for one in classes]), trace.slots.roles[tensor, dim])
        for tensor, dim in entries[classes[0]]
    )
    rank = {one: c for c, one in enumerate(classes)}
    sites: dict[tuple[str, int], dict[int, list[int]]] = {}
    for module, axis, channels in trace.consumers:
        read = class_of[channels.numpy()]
        positions: dict[int, list[int]] = defaultdict(list)
        for position, (slot, one) in enumerate(zip(channels.tolist(), read.tolist(), strict=True)):
            if slot and one in rank:
                positions[one].append(position)
        if positions:
            sites[module, axis] = positions
    consumers = tuple(Site(module, axis, torch.tensor([p[one] for one in classes])) for (module, axis), p in sites.items())
    return Group(name, len(classes), members, consumers)
