"""One forward pass of the eager network, with labels carried beside the values.

Source of the idea: dependency graphs as in Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023; but the
couplings are found by moving labels through the operations that really run, not by matching kinds of layers.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from pipeline.models import calls
from pipeline.models.calls import Calls, Place, Running, each_module
from pipeline.models.graph import Graph
from pipeline.models.modes import eval_mode, uncached
from pipeline.models.trace import contractions, statistics
from pipeline.models.trace.groups import SiteKey, graph_of
from pipeline.models.trace.labels import Ids, Label, Reason, Slots, core, spread
from pipeline.models.trace.rules import DECIDES, WRITTEN, barrier, join, merge, tied
from pipeline.models.trace.sizes import PythonCall, Stated
from pipeline.models.trace.table import Call, Rule, find, tensors_in

assert contractions, statistics  # importing them fills RULES

INPUT = Reason("network input", "network input", "these channels are given by the network's input")
OUTPUT = Reason("network output", "network output", "these channels are the network's output")
CONSTANTS = "the channels meet values of full size that carry no channels of their own"


class TraceTimeout(RuntimeError):
    """Tracing took longer than it was allowed to."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When tracing has to be done."""

    limit_s: float
    end: float

    @classmethod
    def after(cls, limit_s: float) -> Deadline:
        return cls(limit_s, time.monotonic() + limit_s)

    def check(self, doing: str) -> None:
        if time.monotonic() > self.end:
            raise TraceTimeout(
                f"tracing took more than {self.limit_s:g} s, and ended while {doing}. Trace at a smaller input size (channel "
                "groups do not depend on it, MACs do), give it more threads, or allow more with time_limit_s."
            )


@dataclass(slots=True, kw_only=True)
class Frame(Running):
    """A module that is running, and the label of its first positional input."""

    module: nn.Module
    label: Label | None = None
    num_axes: int = 0


class Trace:
    """What rules see and write.

    Args:
        attention: modules in which a channel axis that is split goes by whole outer parts (heads), see `free_axis`.
    """

    def __init__(self, model: nn.Module, attention: Collection[str] = ()) -> None:
        self.slots = Slots()
        self.macs: dict[str, int] = {}
        """Weight -> multiply-accumulates of the whole batch."""
        self.sites: dict[SiteKey, Ids] = {}
        """Slots along the axis of a value where a weight reads it; in running order."""
        self.refused: Reason | None = None
        self.stack = [Frame("", module=model)]
        self.python: PythonCall | None = None
        """The torch function that Python called and that the operation is a part of."""
        self.stated: list[Stated] = []
        self.attention = frozenset(attention)
        self.multiplying: set[str] = set()
        """Modules that split channels and then multiply them with each other."""
        self.splitting: set[str] = set()
        self.mixes = False
        """Does the result of the operation at hand depend on which channels are there? See `mix`."""
        self._labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._same: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._own = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self._names = {id(tensor): name for name, tensor in reversed(self._own.items())}
        self._kernels = {
            id(weight)
            for module in model.modules()
            if isinstance(module, _ConvNd)
            for weight in module.parameters()
            if weight.dim() == 2 + len(module.kernel_size)
        }

    # --- labels of values ---------------------------------------------------------------------------------------------

    def label(self, tensor: Tensor) -> Label | None:
        """Of a value; a parameter or buffer has its own slots along each axis longer than 1."""
        stored: Label | None = self._labels.get(tensor)
        if stored is not None:
            return stored
        name = self._names.get(id(tensor))
        if name is None and tensor._is_view():  # of something that was written into through another view
            base: Label | None = self._labels.get(tensor._base)
            return Label(note=base.note) if base and base.note else None
        if name is None or tensor.numel() <= 1:
            return None
        shape = (
            tensor.shape[:2] if id(tensor) in self._kernels else tensor.shape
        )  # a kernel's positions are no channels
        axes = {dim: self.slots.of(name, dim, size) for dim, size in enumerate(shape) if size > 1}
        label = Label(axes, source=name)
        self._labels[tensor] = label
        return label

    def put(self, tensor: Tensor, label: Label | None) -> None:
        """Note the label of a result."""
        if label is not None:
            assert all(tensor.shape[axis] == len(ids) for axis, ids in label.axes.items())
            self._labels[tensor] = label

    def depend(self, out: Tensor, read: Sequence[Label], call: Call) -> None:
        """A result that a rule says nothing about carries no channels; but it may change with a cut, like what it was made of."""
        if self.label(out) is None and out not in self._same:
            note = next((label.note for label in read if label.note), None)
            self.put(out, Label(note=note or self.reason(call, "these values carry no channels")))

    def written(self, call: Call) -> None:
        """A value that was written into through a view depends on what was written, though its own label knows nothing of it."""
        for tensor in call.mutated:
            self._same.pop(tensor, None)
            base = tensor._base
            if base is not None and self.label(tensor) is not None:
                self._same.pop(base, None)
                if self.label(base) is None:
                    self.put(base, Label(note=self.reason(call, WRITTEN)))

    def join(
        self, call: Call, tensors: Sequence[Tensor], *, shape: torch.Size | None = None, skip: int | None = None
    ) -> Label | None:
        """Label of an elementwise combination, broadcast to `shape`; None if no operand has a label.

        Labels along the same axis are united. An operand that is as long as the labels but has none freezes them.
        """
        labels = [label for label in map(self.label, tensors) if label is not None]
        if not labels:
            return None
        shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors)) if shape is None else shape
        axes = {}
        for axis in range(len(shape)):
            places = [(t, axis - len(shape) + t.dim()) for t in tensors if axis - len(shape) + t.dim() >= 0]
            ids = self.join_along(call, places) if axis != skip else None
            if ids is not None:
                axes[axis] = ids
        note = next((label.note for label in labels if label.note), None)
        source = None
        if all(label.source for label in labels):  # made of parameters alone
            whole = [label.source for t, label in ((t, self.label(t)) for t in tensors) if label and t.shape == shape]
            source = whole[0] if len(set(whole)) == 1 else None
        return Label(axes, note, source)

    def join_along(self, call: Call, places: Sequence[tuple[Tensor, int]]) -> Ids | None:
        """Unite the labels of (tensor, axis); None, and frozen, if a tensor has none there.

        Size 1 joins nothing, nor does what holds one value along the axis: its size may follow the code.
        """
        known: list[Ids] = []
        computed = False
        blind: list[Label | None] = []
        for tensor, axis in places:
            if tensor.shape[axis] == 1:
                continue
            label = self.label(tensor)
            ids = label.axes.get(axis) if label else None
            if ids is None and (tensor.stride(axis) == 0 or tensor in self._same):
                continue
            if ids is None:
                blind.append(label)
            else:
                known.append(ids)
                computed |= label is not None and label.source is None
        if not known:
            return None
        for other in known[1:]:
            self.unite(known[0], other, call)
        if blind:
            if computed and any(label is not None and label.axes for label in blind):
                self.meet()  # it was split along another axis
            for ids in known:
                self.freeze_as(ids, next((label.note for label in blind if label), None), call, CONSTANTS)
            return None
        return merge(known)

    def move(self, call: Call, run: Callable[[Tensor], Any]) -> None:
        """Run a data movement on each axis of the first tensor's label, as a tensor of slots of the tensor's shape."""
        x = call.tensors[0]
        label = self.label(x)
        if label is None:
            return
        results: list[dict[int, Ids]] = [{} for _ in call.outputs]
        for axis, ids in label.axes.items():
            for axes, plane in zip(results, tensors_in(run(spread(ids, x.shape, axis))), strict=True):
                if not plane.numel():
                    continue
                small = core(tied(self, call, plane))
                for new_axis, size in enumerate(small.shape):
                    if size > 1:
                        moved = np.ascontiguousarray(small.reshape(-1).numpy())
                        axes[new_axis] = self._one_of(axes.get(new_axis), moved, call)
        for out, axes in zip(call.outputs, results, strict=True):
            self.put(out, Label(axes, label.note, label.source if out.numel() == x.numel() else None))

    def _one_of(self, first: Ids | None, second: Ids, call: Call) -> Ids:
        """Two kinds of channels merge into one axis: one of them has to stay, if it can be one that no weight writes or reads."""
        text = "two kinds of channels are merged into one axis"
        if first is None or self.slots.all_frozen(first):
            return second
        if self.slots.all_frozen(second):
            return first
        if self.slots.role(first) and not self.slots.role(second):
            first, second = second, first
        self.freeze(first, call, text)
        if self.slots.role(first):
            self.freeze(second, call, text)
        return second

    def free_axis(self, varying: Sequence[int], shape: Sequence[int]) -> int:
        """Which of the axes that a channel axis is split into is cut; along the others it is tied.

        What remains must be a tensor again, so it is one of them: the one whose size the code leaves open (-1), or else the
        innermost: the same offset goes in each outer part. In modules that multiply channels with each other it is whole
        heads: the axis as long as an attribute that counts heads, or the last but one, as in (3, heads, head_dim).
        """
        frame = self.stack[-1]
        self.splitting.add(frame.path)
        stated = self.python.stated_shape() if self.python else []
        opened = [axis for axis in varying if axis < len(stated) and stated[axis] == -1]
        if frame.path not in self.attention:
            return opened[0] if len(opened) == 1 else varying[-1]
        named = {v for k, v in vars(frame.module).items() if "head" in k and "dim" not in k and isinstance(v, int)}
        heads = [axis for axis in varying[:-1] if shape[axis] in named]
        return heads[-1] if heads else varying[-2]

    # --- what rules conclude ------------------------------------------------------------------------------------------

    def unite(self, a: Ids, b: Ids, call: Call) -> None:
        """a[i] and b[i] go together; what meets a position that stays, stays."""
        self.slots.unite(a, b)
        for ids, other in ((a, b), (b, a)):
            alone = ids[(ids > 0) & (other == 0)]
            if len(alone):
                self.freeze(alone, call, "the channels meet padding or constants, which stay")

    def freeze(self, ids: Ids, call: Call, text: str) -> None:
        self.slots.freeze(ids, self.reason(call, text))

    def freeze_as(self, ids: Ids, note: Reason | None, call: Call, text: str) -> None:
        """Freeze for the reason that an operand carries, or else for one of this operation."""
        if ids.any():
            self.slots.freeze(ids, note or self.reason(call, text))

    def mix(self) -> None:
        """The operation at hand takes a statistic over channels: its result is another one without those that are removed.

        That is allowed: the reference takes the statistic over the channels that are kept (`pruning.reference.Masked`).
        """
        self.mixes = True

    def meet(self) -> None:
        """Channels of one value are summed over, or compared, in the running module: a kind of attention. If it has split
        channels before, then by the axis of which whole parts (heads) go."""
        self.multiplying |= {self.stack[-1].path} & self.splitting

    def set_same_everywhere(self, tensor: Tensor) -> None:
        """A tensor without labels that holds one value: its size follows the code."""
        self._same[tensor] = True

    def refuse(self, operation: str, text: str) -> None:
        """Nothing may be cut at all."""
        self.refused = self.refused or Reason(operation, self._where(), text)

    def consume(self, call: Call, weight: str, ids: Ids, axis: int) -> None:
        """The channels `ids` end at a weight: note the value that carries them, where Python can get hold of it."""
        self.end(call, ids, self._layer_input(weight, ids, axis))

    def end(self, call: Call, ids: Ids, layer: tuple[SiteKey, Ids] | None = None) -> None:
        """The channels `ids` end in this contraction: at the input of a layer, or else at an argument of the call."""
        key, there = layer or self._argument(ids) or (None, ids)
        if key is None:
            self.freeze(ids, call, "the values that are multiplied cannot be told from the arguments of the call")
            return
        before = self.sites.setdefault(key, there)
        if len(before) == len(there):
            self.unite(before, there, call)
        else:
            self.freeze(np.concatenate([before, there]), call, "the layer is called with inputs of other layouts")

    def _layer_input(self, weight: str, ids: Ids, axis: int) -> tuple[SiteKey, Ids] | None:
        """The first input of the running module, if that is a layer of its own and reads these channels with its weight."""
        frame = self.stack[-1]
        matrices = [p for p in frame.module._parameters.values() if p is not None and p.dim() > 1]
        if len(matrices) != 1 or matrices[0] is not self._own[weight] or next(frame.module.children(), None):
            return None
        there = frame.label.axes.get(axis % frame.num_axes) if frame.label else None
        if there is None or not np.array_equal(self._classes(there), self._classes(ids)):
            return None
        return (frame.path, axis, None), there

    def _argument(self, ids: Ids) -> tuple[SiteKey, Ids] | None:
        """The argument of the running torch function that carries these channels."""
        wanted, python = self._classes(ids), self.python
        for i, tensor in enumerate(python.tensors if python else ()):
            label = self.label(tensor)
            for axis, there in label.axes.items() if label and label.source is None else ():
                if np.array_equal(self._classes(there), wanted):
                    assert python is not None
                    return (self.stack[-1].path, axis, (python.index, i, python.name)), there
        return None

    def _classes(self, ids: Ids) -> Ids:
        return np.unique(self.slots.find(ids))

    def reason(self, call: Call, text: str) -> Reason:
        return Reason(call.name, self._where(), text)

    def _where(self) -> str:
        """ "module path (file.py:line)": the innermost line outside torch and this package."""
        path = self.stack[-1].path or "the network"
        skipped = (_LIBRARY, f"{Path(__file__).parent}{os.sep}", str(calls.__file__))
        frame: Any = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith(skipped):
            frame = frame.f_back
        return f"{path} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})" if frame is not None else path


# --- the run ----------------------------------------------------------------------------------------------------------


class Operations(TorchDispatchMode):
    """Inside, labels go along with all that runs."""

    def __init__(self, trace: Trace, deadline: Deadline | None = None) -> None:
        super().__init__()
        self.trace = trace
        self.deadline = deadline

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.follow(Call(func, args, kwargs or {}, out))
        return out

    def follow(self, call: Call) -> Rule | None:
        """Apply the operation's rule."""
        call.name, rule = find(call.name)
        self.trace.mixes = False
        read = [label for label in map(self.trace.label, call.tensors) if label is not None]
        if rule is not None:
            try:
                rule.apply(self.trace, call)
            except Exception as error:  # a form of the operation that its rule does not know is not guessed either
                text = f"the rule for this operation does not fit this form of it ({type(error).__name__}: {error})"
                for ids in (ids for label in read for ids in label.axes.values()):
                    self.trace.freeze(ids, call, text)
                barrier(self.trace, call, text)
        elif torch.Tag.pointwise in call.func.tags and torch.Tag.nondeterministic_seeded not in call.func.tags:
            join(self.trace, call)
        else:
            barrier(self.trace, call)
        for out in call.outputs if read else ():
            self.trace.depend(out, read, call)
        self.trace.written(call)
        if self.deadline:
            self.deadline.check(f"following {self.trace.stack[-1].path or 'the network'}")
        return rule


class PythonCalls(Calls):
    """Remembers which torch function was called: ATen tells neither `chunk` from `split` nor where a size stood."""

    def __init__(self, trace: Trace, *, sizes: bool = True) -> None:
        super().__init__(trace.stack)
        self.trace = trace
        self.sizes = sizes

    def call(self, place: Place, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace, (_, index, name) = self.trace, place
        if name in READS_VALUES and trace.label(args[0]) is not None:
            trace.refuse(name, DECIDES)
        call = trace.python = PythonCall(func, args, kwargs, index, _caller())
        out = func(*args, **kwargs)
        if self.sizes:
            trace.stated += call.stated(trace, out)
        trace.python = None
        return out

    def attribute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = func(*args, **kwargs)
        same = isinstance(out, Tensor) and isinstance(args[0], Tensor) and out.shape == args[0].shape
        if same and self.trace.label(out) is None:  # x.data: no operation ran
            self.trace.put(out, self.trace.label(args[0]))
        return out


READS_VALUES = ("tolist", "numpy", "__array__")
"""Functions that read the memory of a tensor without any operation."""
_LIBRARY = f"{Path(torch.__file__).parent}{os.sep}"
_LAYERS = f"{_LIBRARY}nn{os.sep}modules{os.sep}"


def _caller() -> FrameType:
    """The innermost frame of a network's code: outside of this package's tracer and of torch, but for torch's layers."""
    frame = sys._getframe(3)  # behind `PythonCalls.call` and `Calls.__torch_function__`
    while frame.f_back is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_LIBRARY) or name.startswith(_LAYERS):
            break
        frame = frame.f_back
    return frame


def module_stack(model: nn.Module, trace: Trace) -> AbstractContextManager[None]:
    """Inside, the trace knows which module runs."""

    def enter(path: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        frame = Frame(path, module=module)
        if inputs and isinstance(inputs[0], Tensor):
            with torch._C.DisableTorchFunction():  # what a hook asks is no call of the network's
                frame.label, frame.num_axes = trace.label(inputs[0]), inputs[0].dim()
        trace.stack.append(frame)

    return each_module(model, enter, lambda *_: trace.stack.pop())


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Inside, the network is in eval mode; afterwards it is as before, buffers and random numbers included."""
    buffers = [(buffer, buffer._version, buffer.clone()) for buffer in model.buffers()]
    try:
        with eval_mode(model), uncached(model), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for buffer, version, content in buffers:
            if buffer._version != version:
                buffer.copy_(content)


@torch.no_grad()
def propagate(
    model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], *, deadline: Deadline | None = None
) -> Graph:
    """Channel groups of `model` by label propagation alone; `pruning.trials.trace` tries them out as well.

    Args:
        model: any eager network; it is run once in eval mode and left as it was.
        example_inputs: a batch it accepts, float [N, C, H, W] for images; N = 1 is enough. Its size decides the MACs.

    Returns:
        Groups of what is understood. All other channels are frozen, with operation, place and reason. `sizes` are all that
        the code states; not all of them need to be brought up to date.

    Raises:
        ValueError: the network does not run on `example_inputs`.
        TraceTimeout: it was not done in time.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    trace, output = _run(model, inputs, Trace(model), deadline)
    while not trace.multiplying <= trace.attention:  # once more, now by whole heads where channels meet channels
        attention = trace.attention | trace.multiplying
        trace, output = _run(model, inputs, Trace(model, attention), deadline)
    for tensor in tensors_in(output):
        for ids in (trace.label(tensor) or Label()).axes.values():
            trace.slots.freeze(ids, OUTPUT)
    return graph_of(model, trace, tuple(inputs[0].shape))


def _run(model: nn.Module, inputs: tuple[Tensor, ...], trace: Trace, deadline: Deadline | None) -> tuple[Trace, Any]:
    for tensor in inputs:
        trace.put(tensor, Label(note=INPUT))
    with _untouched(model):
        try:
            with module_stack(model, trace), PythonCalls(trace), Operations(trace, deadline):
                return trace, model(*inputs)
        except TraceTimeout:
            raise
        except Exception as error:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
            raise ValueError(f"the network does not run on inputs of shape {shapes}: {error}") from error
