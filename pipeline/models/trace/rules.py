"""What each ATen operation does to labels. A rule is a function registered under the operation's name, with its kind as data.

An operation without a rule is a barrier: the labels that reach it are frozen, with the operation, the module and the line as the
reason. It is never taken for elementwise. `rule` is the hook for operations of one's own:

    @rule("mylib::scale_channels", kind="join")
    def _(trace, call): trace.join(call)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.models.trace.labels import along, compress, varying, vector

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace


@dataclass
class Call:
    """One operation as it ran."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any

    def arg(self, index: int, name: str, default: Any = None) -> Any:
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    @property
    def outputs(self) -> list[Tensor]:
        items = self.out if isinstance(self.out, tuple | list) else (self.out,)
        return [item for item in items if isinstance(item, Tensor)]


@dataclass(frozen=True)
class Rule:
    apply: Callable[[Trace, Call], None]
    kind: str
    """join, move, window, reduce, contract, norm, tie, or silent; for the table in the documentation."""


RULES: dict[str, Rule] = {}
"""ATen name without overload -> rule. Operations tagged pointwise by torch need no entry: they join."""


def rule(*names: str, kind: str) -> Callable[[Callable[[Trace, Call], None]], Callable[[Trace, Call], None]]:
    def register(apply: Callable[[Trace, Call], None]) -> Callable[[Trace, Call], None]:
        RULES.update({name: Rule(apply, kind) for name in names})
        return apply

    return register


# --- join: pointwise operations -----------------------------------------------------------------------------------------


@rule("aten::copy_", "aten::where", "aten::lerp", "aten::addcmul", "aten::hardswish", "aten::_prelu_kernel", "aten::native_dropout",
    "aten::dropout", kind="join")
def join(trace: Trace, call: Call) -> None:
    """Labels that meet in one element go together; an unlabelled operand of full size freezes what it meets."""
    tensors = [value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    labels = [(t, trace.label(t)) for t in tensors]
    known = [label.expand(shape) for _, label in labels if label is not None]
    if not known:
        return
    first = known[0]
    for other in known[1:]:
        trace.unite_elements(first, other)
    joined = _merged(known)
    for tensor, label in labels:
        padded = (1,) * (len(shape) - tensor.dim()) + tuple(tensor.shape)
        for axis in varying(joined):
            if padded[axis] > 1 and (label is None or axis not in varying(label.expand(shape))):
                trace.freeze(joined, call, "an operand has values of its own for each channel, and where they come from is not known")
                return
    trace.put(call.outputs[0], joined)


def _merged(labels: list[Tensor]) -> Tensor:
    """One label for the result: the first that is known for each element."""
    result = labels[0]
    for label in labels[1:]:
        if varying(label) != varying(result) or bool((result == 0).any()):
            narrow = [slice(0, 1) if not ({axis} & {*varying(label), *varying(result)}) else slice(None) for axis in range(result.dim())]
            small, other = result[tuple(narrow)], label[tuple(narrow)]
            result = compress(torch.where(small > 0, small, other)).expand(result.shape)
    return result


# --- move: the operation runs on the labels themselves ------------------------------------------------------------------


@rule(
    "aten::permute", "aten::transpose", "aten::t", "aten::unsqueeze", "aten::squeeze", "aten::expand", "aten::alias", "aten::detach",
    "aten::flip", "aten::movedim",
    kind="move",
)  # fmt: skip
def move(trace: Trace, call: Call) -> None:
    label = trace.label(call.args[0])
    if label is not None:
        trace.put(call.outputs[0], call.func(label, *call.args[1:], **call.kwargs))


@rule("aten::clone", "aten::_to_copy", "aten::contiguous", "aten::to", "aten::lift_fresh", kind="move")
def same(trace: Trace, call: Call) -> None:
    trace.put(call.outputs[0], trace.label(call.args[0]))


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::flatten", "aten::unflatten", kind="move")
def reshape(trace: Trace, call: Call) -> None:
    """Axes may merge (flatten before a classifier); an axis of channels that is split in two is frozen."""
    label = trace.label(call.args[0])
    if label is None:
        return
    moved = compress(label.reshape(call.outputs[0].shape))
    if len(varying(moved)) > 1:
        trace.freeze(label, call, "the channel axis is split into several axes")
    else:
        trace.put(call.outputs[0], moved)


@rule("aten::cat", kind="move")
def cat(trace: Trace, call: Call) -> None:
    tensors, dim = call.args[0], call.arg(1, "dim", 0)
    out = call.outputs[0]
    dim %= out.dim()
    parts = [torch.zeros(1, dtype=torch.int64).expand(t.shape) if trace.label(t) is None else trace.label(t) for t in tensors]
    if all(trace.label(t) is None for t in tensors):
        return
    free = [axis for axis in range(out.dim()) if axis != dim and not any(axis in varying(part) for part in parts)]
    small = torch.cat([part[tuple(slice(0, 1) if a in free else slice(None) for a in range(out.dim()))] for part in parts], dim)
    label = compress(small).expand([n if a in free else small.shape[a] for a, n in enumerate(out.shape)])
    if len(varying(label)) > 1:
        trace.freeze(label, call, "tensors are joined along another axis than their channels")
    else:
        trace.put(out, label)


@rule("aten::slice", "aten::select", "aten::split", "aten::split_with_sizes", "aten::chunk", "aten::unbind", "aten::narrow", kind="move")
def part(trace: Trace, call: Call) -> None:
    """Taking parts along an unlabelled axis; along the channels positions are literal, so all of them stay."""
    label = trace.label(call.args[0])
    if label is None:
        return
    name = call.func.overloadpacket.__name__
    dim = call.arg(1, "dim", 0) if name in {"slice", "select", "unbind", "narrow"} else call.arg(2, "dim", 0)
    dim %= label.dim()
    results = call.func(label, *call.args[1:], **call.kwargs)
    results = results if isinstance(results, tuple | list) else [results]
    whole = name == "slice" and results[0].shape == label.shape
    if dim in varying(label) and not whole:
        trace.freeze(label, call, "channels are taken by their position")
        return
    for out, moved in zip(call.outputs, results, strict=True):
        trace.put(out, moved)


@rule("aten::constant_pad_nd", "aten::pad", "aten::reflection_pad2d", "aten::replication_pad2d", kind="move")
def pad(trace: Trace, call: Call) -> None:
    label = trace.label(call.args[0])
    if label is None:
        return
    out = call.outputs[0]
    if any(label.shape[axis] != out.shape[axis] for axis in varying(label)):
        trace.freeze(label, call, "zeros are added to the channel axis")
    else:
        trace.put(out, _respread(label, out.shape))


# --- windows and reductions over space ----------------------------------------------------------------------------------


@rule(
    "aten::max_pool2d_with_indices", "aten::max_pool2d", "aten::avg_pool2d", "aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d",
    "aten::adaptive_max_pool2d", "aten::upsample_nearest2d", "aten::upsample_bilinear2d", "aten::upsample_bicubic2d",
    "aten::_upsample_bilinear2d_aa", "aten::mkldnn_max_pool2d", "aten::max_pool3d_with_indices", "aten::avg_pool3d",
    kind="window",
)  # fmt: skip
def window(trace: Trace, call: Call) -> None:
    label = trace.label(call.args[0])
    if label is None:
        return
    if any(axis >= 2 for axis in varying(label)):
        trace.freeze(label, call, "a window slides over the channel axis")
    else:
        trace.put(call.outputs[0], _respread(label, call.outputs[0].shape))


def _respread(label: Tensor, shape: torch.Size) -> Tensor:
    """The label of a result whose unlabelled axes have other sizes."""
    free = [axis for axis in range(label.dim()) if axis not in varying(label)]
    for axis in free:
        label = label.narrow(axis, 0, 1)
    return label.expand(shape)


@rule("aten::mean", "aten::sum", "aten::amax", "aten::amin", kind="reduce")
def reduce(trace: Trace, call: Call) -> None:
    label = trace.label(call.args[0])
    if label is None:
        return
    dims = call.arg(1, "dim") if call.func._overloadname in {"dim", "dim_IntList", "default"} else None
    dims = [dims] if isinstance(dims, int) else dims
    axes = {d % label.dim() for d in dims} if dims else set(range(label.dim()))
    if axes & set(varying(label)):
        trace.freeze(label, call, "a statistic is taken over the channels")
        return
    keepdim = bool(call.arg(2, "keepdim", False))
    for axis in sorted(axes, reverse=True):
        label = label.narrow(axis, 0, 1) if keepdim else label.select(axis, 0)
    trace.put(call.outputs[0], label)


# --- norms --------------------------------------------------------------------------------------------------------------


@rule(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::_native_batch_norm_legit", "aten::batch_norm",
    "aten::cudnn_batch_norm", "aten::_batch_norm_no_update", "aten::_batch_norm_impl_index",
    kind="norm",
)  # fmt: skip
def batch_norm(trace: Trace, call: Call) -> None:
    """Scale, shift and statistics of a channel go with it."""
    x = call.args[0]
    owned = [t for t in call.args[1:5] if isinstance(t, Tensor)]
    label = trace.label(x)
    channels = None if label is None else vector(label, 1)
    for tensor in owned:
        slots = trace.parameter(tensor, "affine")
        if slots is None and channels is not None:
            trace.freeze(channels, call, "a batch norm uses a tensor that is no parameter of the network")
        elif slots is not None and channels is None:
            trace.freeze(slots, call, "the norm's input has no channels that are known")
        elif slots is not None and channels is not None:
            trace.unite_or_freeze(channels, slots, call)
    trace.put(call.outputs[0], label)


# --- contractions -------------------------------------------------------------------------------------------------------


@rule("aten::convolution", "aten::_convolution", "aten::cudnn_convolution", "aten::mkldnn_convolution", kind="contract")
def convolution(trace: Trace, call: Call) -> None:
    """New channels from the weight; its input slots tie to the input's. Groups go whole, depthwise being groups of one."""
    x, weight, bias = call.args[:3]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    out = call.outputs[0]
    name = trace.name_of(weight)
    if name is None or not trace.is_own_module(name):
        trace.barrier(call, "the weight of a convolution is computed, or used outside of its module")
        return
    spatial = x if transposed else out
    trace.contraction(name, spatial.numel() // (spatial.shape[0] * spatial.shape[1]))
    label = trace.label(x)
    channels = torch.zeros(x.shape[1], dtype=torch.int64) if label is None else vector(label, 1)
    if channels is None:
        trace.barrier(call, "the convolution's input varies along another axis than its channels")
        return
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if groups == 1:
        out_slots = trace.slots.of(name, out_dim, out.shape[1], "out")
        in_slots = trace.slots.of(name, in_dim, x.shape[1], "in")
        trace.unite_or_freeze(channels, in_slots, call)
        trace.consumer(name, 1, channels)
    elif transposed:
        trace.barrier(call, "grouped transposed convolutions are not known")
        return
    else:
        out_slots = trace.slots.of(name, out_dim, out.shape[1], "out")
        by_group = channels.view(groups, -1)
        outputs = out_slots.view(groups, -1)
        for inputs in by_group.unbind(1):
            trace.unite_or_freeze(inputs, outputs[:, 0], call)
        for others in outputs.unbind(1):
            trace.slots.unite(outputs[:, 0], others)
    if bias is not None:
        trace.tie_bias(bias, out_slots, call)
    trace.put(out, along(out_slots, out.shape, 1))


@rule("aten::addmm", "aten::mm", "aten::linear", kind="contract")
def linear(trace: Trace, call: Call) -> None:
    """x @ weight.T (+ bias)."""
    name_of_op = call.func.overloadpacket.__name__
    if name_of_op == "linear":
        x, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
        name = trace.name_of(weight)
    else:
        bias, x, weight = call.args[:3] if name_of_op == "addmm" else (None, *call.args[:2])
        name = trace.name_of_transposed(weight)
    out = call.outputs[0]
    if name is None or not trace.is_own_module(name):
        trace.barrier(call, "the weight of a matrix product is computed, or used outside of its module")
        return
    trace.contraction(name, x.numel() // (trace.batch * x.shape[-1]))
    label = trace.label(x)
    channels = torch.zeros(x.shape[-1], dtype=torch.int64) if label is None else vector(label, -1)
    if channels is None:
        trace.barrier(call, "the matrix product's input varies along another axis than its features")
        return
    out_slots = trace.slots.of(name, 0, out.shape[-1], "out")
    trace.unite_or_freeze(channels, trace.slots.of(name, 1, x.shape[-1], "in"), call)
    trace.consumer(name, -1, channels)
    if bias is not None:
        trace.tie_bias(bias, out_slots, call)
    trace.put(out, along(out_slots, out.shape, out.dim() - 1))


# --- operations that make or ask nothing about channels -------------------------------------------------------------------


@rule("aten::sym_size", "aten::size", "aten::is_contiguous", "aten::_assert_async", "aten::profiler", kind="silent")
def silent(trace: Trace, call: Call) -> None:
    """Asks about a shape, not about values."""
    del trace, call
