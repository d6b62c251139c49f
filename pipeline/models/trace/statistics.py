"""Rules for operations that take a statistic: over channels it is allowed, and mixes them (`Trace.mix`)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pipeline.models.trace.labels import Label
from pipeline.models.trace.rules import axes_of, barrier, tie_rows
from pipeline.models.trace.table import Call, rule

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace


@rule(
    "aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::var", "aten::std",
    "aten::var_mean", "aten::std_mean", "aten::prod", "aten::logsumexp", "aten::linalg_vector_norm", "aten::norm",
    "aten::any", "aten::all", "aten::median", "aten::count_nonzero", "aten::linalg_norm",
    kind="statistic",
)  # fmt: skip
def reduce(trace: Trace, call: Call) -> None:
    """Axes that are reduced leave the label."""
    x = call.tensors[0]
    if len(call.tensors) > 1:  # max and min of two tensors are pointwise
        trace.put(call.outputs[0], trace.join(call, call.tensors))
        return
    label = trace.label(x)
    if label is None:
        return
    gone = axes_of(call, x)
    if gone & {*label.axes}:
        trace.meet()
        trace.mix()
    keepdim = bool(call.get("keepdim", False))
    kept = {
        axis if keepdim else axis - sum(other < axis for other in gone): ids
        for axis, ids in label.axes.items()
        if axis not in gone
    }
    for out in call.outputs:
        trace.put(out, Label(kept, label.note, label.source))


@rule("aten::argmax", "aten::argmin", kind="barrier")
def position(trace: Trace, call: Call) -> None:
    """The result is a position: a number that a cut would change."""
    label = trace.label(call["self"])
    for axis in axes_of(call, call["self"]) if label else ():
        if label and axis in label.axes:
            trace.freeze(label.axes[axis], call, "the position of a channel is a result")
    reduce(trace, call)
    trace.mixes = False


@rule(
    "aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax", "aten::cumsum", "aten::cumprod", "aten::logcumsumexp",
    kind="statistic",
)  # fmt: skip
def along(trace: Trace, call: Call) -> None:
    """Each result depends on all channels along the axis, and has as many of them."""
    label = trace.label(call["self"])
    if label is not None:
        if axes_of(call, call["self"]) & {*label.axes}:
            trace.mix()
        trace.put(call.outputs[0], Label(label.axes, label.note))


@rule("aten::_weight_norm_interface", "aten::_weight_norm", kind="statistic")
def weight_norm(trace: Trace, call: Call) -> None:
    """g * v / |v|, with a length of v for each entry of dim 0: over its other dimensions it is a statistic."""
    v, g = call["v"], call["g"]
    label = trace.label(v)
    if label is None:
        return
    axes, dim = dict(label.axes), call["dim"] % v.dim()
    channels = trace.join_along(call, [(v, dim), (g, dim)])
    axes.pop(dim, None)
    if axes:
        trace.mix()
    if channels is not None:
        axes[dim] = channels
    trace.put(call.outputs[0], Label(axes, label.note, label.source))
    for norm in call.outputs[1:]:
        trace.put(norm, Label({dim: channels} if channels is not None else {}, label.note))


@rule("aten::mv", "aten::dot", "aten::vdot", kind="statistic")
def product_of_parameters(trace: Trace, call: Call) -> None:
    """The u W v of a spectral norm: over what is kept. Products with a vector that is computed are not followed."""
    matrix, vector = call.tensors
    labels = [label for label in map(trace.label, call.tensors) if label is not None and label.source is not None]
    if len(labels) < 2:
        barrier(trace, call)
        return
    last = matrix.dim() - 1
    if trace.join_along(call, [(matrix, last), (vector, 0)]) is not None:
        trace.mix()
    axes = {axis: ids for axis, ids in labels[0].axes.items() if axis != last}
    trace.put(call.outputs[0], replace(labels[0], axes=axes))


# --- norms ------------------------------------------------------------------------------------------------------------


@rule(
    "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm", "aten::_native_batch_norm_legit",
    "aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update", "aten::_batch_norm_with_update",
    kind="norm",
)  # fmt: skip
def batch_norm(trace: Trace, call: Call) -> None:
    """Scale, shift and running statistics go with their channel. Statistics of the batch leave channels apart, too."""
    x = call["input"]
    label = trace.label(x)
    owned = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    owned = [tensor for tensor in owned if isinstance(tensor, Tensor)]
    channels = trace.join_along(call, [(x, 1), *((tensor, 0) for tensor in owned)])
    if label is None and channels is None:
        return
    axes = dict(label.axes) if label else {}
    axes.pop(1, None)
    if axes and call.get("training", not call.name.endswith(("no_training", "no_update"))):
        trace.mix()  # standardised weights: over all that a row of them reads
    if channels is not None:
        axes[1] = channels
    note, source = (label.note, label.source) if label else (None, None)
    trace.put(call.outputs[0], Label(axes, note, source))
    for out in call.outputs[1:]:
        trace.put(out, Label({0: channels} if channels is not None and out.shape == channels.shape else {}, note))


def _normalized_shape(bound: dict[str, Any]) -> dict[str, Any]:
    width = len(bound["normalized_shape"])
    return {**bound, "normalized_shape": list(bound["input"].shape[-width:])}


def _channels(bound: dict[str, Any]) -> dict[str, Any]:
    rows, channels, *space = bound["input"].shape
    return {**bound, "N": rows, "C": channels, "HxW": math.prod(space)}


@rule("aten::native_layer_norm", "aten::_fused_rms_norm", kind="norm", resize=_normalized_shape)
def layer_norm(trace: Trace, call: Call) -> None:
    x, width = call["input"], len(call["normalized_shape"])
    over = range(x.dim() - width, x.dim())
    label = trace.label(x)
    axes = dict(label.axes) if label else {}
    owned = [tensor for tensor in (call["weight"], call.get("bias")) if tensor is not None]
    for i, axis in enumerate(over):
        ids = trace.join_along(call, [(x, axis), *((tensor, i) for tensor in owned)])
        axes.pop(axis, None)
        if ids is not None:
            axes[axis] = ids
            trace.mix()
    _normed(trace, call, axes)


@rule("aten::native_group_norm", kind="norm", resize=_channels)
def group_norm(trace: Trace, call: Call) -> None:
    """The channels of one statistic go together, so the others keep theirs; if all share one, it is taken over those kept."""
    x, num_groups = call["input"], call["group"]
    label = trace.label(x)
    owned = [tensor for tensor in (call["weight"], call["bias"]) if tensor is not None]
    axes = dict(label.axes) if label else {}
    axes.pop(1, None)
    channels = trace.join_along(call, [(x, 1), *((tensor, 0) for tensor in owned)])
    if axes:
        trace.mix()
    if channels is not None:
        axes[1] = channels
        if num_groups == 1:
            trace.mix()
        else:
            tie_rows(trace, call, channels.reshape(num_groups, -1).T)
    _normed(trace, call, axes)


def _normed(trace: Trace, call: Call, axes: dict[int, Any]) -> None:
    label = trace.label(call["input"])
    for out in call.outputs:
        fits = {axis: ids for axis, ids in axes.items() if axis < out.dim() and out.shape[axis] == len(ids)}
        trace.put(out, Label(fits, label.note if label else None))
