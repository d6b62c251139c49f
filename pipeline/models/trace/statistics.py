"""Rules for operations that take a statistic: over space it passes, over channels they stay whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pipeline.models.trace.labels import Label
from pipeline.models.trace.rules import over_axis
from pipeline.models.trace.table import Call, rule

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace


@rule(
    "aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::var", "aten::std",
    "aten::var_mean", "aten::std_mean", "aten::prod", "aten::logsumexp", "aten::linalg_vector_norm", "aten::norm",
    "aten::argmax", "aten::argmin", "aten::any", "aten::all", "aten::median", "aten::count_nonzero",
    kind="statistic",
)  # fmt: skip
def reduce(trace: Trace, call: Call) -> None:
    """Axes that are reduced leave the label; channels among them are frozen."""
    x, given = call.tensors[0], call.get("dim")
    if len(call.tensors) > 1:  # max and min of two tensors are pointwise
        trace.put(call.outputs[0], trace.join(call, call.tensors))
        return
    label = trace.label(x)
    if label is None:
        return
    dims = range(x.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    gone = {dim % x.dim() for dim in dims} if x.dim() else set()
    text = "a statistic is taken over the channels, and a cut would change it"
    lost = [axis for axis in label.axes if axis in gone]
    for axis in lost:
        trace.freeze(label.axes[axis], call, text)
    keepdim = bool(call.get("keepdim", False))
    kept = {
        axis if keepdim else axis - sum(other < axis for other in gone): ids
        for axis, ids in label.axes.items()
        if axis not in gone
    }
    note = trace.reason(call, text) if lost else label.note
    for out in call.outputs:
        trace.put(out, Label(kept, note))


@rule("aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax", kind="statistic")
def softmax(trace: Trace, call: Call) -> None:
    over_axis(trace, call, "softmax over the channels divides by a sum that a cut would change")


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
    if call.get("training", not call.name.endswith(("no_training", "no_update"))):
        for axis in list(axes):
            trace.freeze(axes.pop(axis), call, "batch statistics are taken over the channels")
    if channels is not None:
        axes[1] = channels
    note, source = (label.note, label.source) if label else (None, None)
    trace.put(call.outputs[0], Label(axes, note, source))
    for out in call.outputs[1:]:
        trace.put(out, Label({0: channels} if channels is not None and out.shape == channels.shape else {}, note))


@rule("aten::native_layer_norm", "aten::_fused_rms_norm", kind="norm")
def layer_norm(trace: Trace, call: Call) -> None:
    x, width = call["input"], len(call["normalized_shape"])
    text = "the norm takes its statistics over the channels, and a cut would change them"
    _norm_over(trace, call, x, range(x.dim() - width, x.dim()), text)


@rule("aten::native_group_norm", kind="norm")
def group_norm(trace: Trace, call: Call) -> None:
    text = (
        f"GroupNorm takes statistics over {call['C'] // call['group']} channels at a time, and a cut would change them"
    )
    _norm_over(trace, call, call["input"], [1], text)


def _norm_over(trace: Trace, call: Call, x: Tensor, over: range | list[int], text: str) -> None:
    """The channels that are normalised stay; the label lives on, so that all that meets them gives the same reason."""
    label = trace.label(x)
    axes = dict(label.axes) if label else {}
    owned = [tensor for tensor in (call["weight"], call.get("bias")) if tensor is not None]
    last = over[-1]
    if len(over) == 1:
        channels = trace.join_along(call, [(x, last), *((tensor, 0) for tensor in owned)])
        if channels is not None:
            axes[last] = channels
    else:
        for tensor in owned:
            for ids in (trace.label(tensor) or Label()).axes.values():
                trace.freeze(ids, call, text)
    for axis in over:
        if axis in axes:
            trace.freeze(axes[axis], call, text)
    for out in call.outputs:
        fits = {axis: ids for axis, ids in axes.items() if axis < out.dim() and out.shape[axis] == len(ids)}
        trace.put(out, Label(fits, label.note if label else None))
