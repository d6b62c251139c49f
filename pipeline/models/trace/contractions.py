"""Rules for contractions: the weight's output entries make new channels, its input entries go with those they read.

# O, I = output and input channels of a weight, G = groups of a convolution
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pipeline.models.trace.labels import Ids, Label
from pipeline.models.trace.rules import barrier, merge
from pipeline.models.trace.table import Call, rule

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace

NOT_A_CHANNEL = "it reads values along an axis that carries no known channels"


@rule(
    "aten::convolution", "aten::_convolution", "aten::cudnn_convolution", "aten::mkldnn_convolution",
    "aten::miopen_convolution", "aten::slow_conv3d",
    kind="contract",
)  # fmt: skip
def convolution(trace: Trace, call: Call) -> None:
    """Groups of a grouped convolution go whole; in a depthwise one that is single channels, whatever its multiplier."""
    x, weight = call.tensors[:2]
    transposed, groups = bool(call.get("transposed", False)), call.get("groups", 1)
    out = call.outputs[0]
    _multiplied(trace, call, weight, _conv_macs(x, weight, out, transposed))
    label, weights = trace.label(x), trace.label(weight)
    axes = {0: label.axes[0]} if label and 0 in label.axes else {}
    for axis, ids in label.axes.items() if label else ():
        if (
            axis >= 2
            and x.dim() == weight.dim() == out.dim()
            and _slides(call, axis - 2)
            and out.shape[axis] == len(ids)
        ):
            axes[axis] = ids  # as over a sequence: each result reads its neighbours among the channels that are there
            trace.mix()
        elif axis >= 2 or x.dim() != weight.dim():
            trace.freeze(ids, call, "a window slides over the channels")
    made = weights.axes.get(1 if transposed else 0) if weights else None
    if groups > 1:
        made = _by_groups(trace, call, x, weight, made, groups, transposed)
    else:
        _ends(trace, call, x, 1, weight, 0 if transposed else 1)
    axes |= _made(trace, call, weight, made, call.get("bias"), 1)
    if label or weights:
        trace.put(out, Label(axes, weights.note if weights else None))


def _slides(call: Call, axis: int) -> bool:
    stride = call.get("stride", 1)
    return bool((stride if isinstance(stride, int) else [*stride][axis if len(stride) > 1 else 0]) == 1)


def _conv_macs(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
    """One product for each weight entry and output position; of a transposed convolution, input position."""
    at = x if transposed else out
    return weight.numel() * (at.numel() // at.shape[1])


def _by_groups(
    trace: Trace, call: Call, x: Tensor, weight: Tensor, made: Ids | None, groups: int, transposed: bool
) -> Ids | None:
    """Tie all that belongs to one convolution group; its channels pass through, so the weight does not consume them."""
    label, weights = trace.label(x), trace.label(weight)
    read, width = (label.axes.get(1) if label else None), call.outputs[0].shape[1] // groups
    own = weights.axes.get(0) if weights else None
    if weights is None or weights.source is None:
        if groups == x.shape[1] and own is None and weight.stride(0) == 0 and read is not None:
            return np.repeat(read, width)  # one kernel for all channels, as often as there are channels
        for ids in (read, *(weights.axes.values() if weights else ())):
            if ids is not None:
                trace.freeze(ids, call, "the weight is computed")
        return None
    written = own if transposed else made  # the weight's entries that go with a group, beside those that it reads
    if written is None or read is None:
        for ids in (made, own, read):
            if ids is not None:
                trace.freeze_as(ids, label.note if label else None, call, NOT_A_CHANNEL)
        return made
    first = written.reshape(groups, -1)[:, 0]
    for column in (*written.reshape(groups, -1).T[1:], *read.reshape(groups, -1).T):
        trace.unite(first, column, call)
    if not transposed:
        return made
    if made is not None:  # one entry of each group's width, shared by all groups
        trace.freeze(made, call, "a grouped transposed convolution goes by whole groups")
    return np.repeat(first, width)


@rule("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", kind="contract")
def matrix_product(trace: Trace, call: Call) -> None:
    """a [..., M, K] times b [..., K, N]; whichever of them is a parameter is the weight."""
    a, b, bias, b_in, b_out = _factors(call)
    out, a_in = call.outputs[0], a.dim() - 1
    left, right = trace.label(a), trace.label(b)
    if left is None and right is None:
        return
    axes = {axis: ids for axis, ids in left.axes.items() if axis != a_in} if left else {}
    if b.dim() == 3:
        batch = trace.join_along(call, [(a, 0), (b, 0)])
        axes.pop(0, None)
        axes |= {0: batch} if batch is not None else {}
    made = right.axes.get(b_out) if right else None
    computed = [label.note for label in (left, right) if label and label.source is None]
    note = next((note for note in computed if note), None)
    if left is not None and right is not None and left.source is None and right.source is None:
        _meet(trace, call, (a, a_in), (b, b_in))
        axes |= {out.dim() - 1: made} if made is not None else {}
        trace.put(out, Label(axes, note))
        return
    weight_is_left = right is None or (right.source is None and left is not None and left.source is not None)
    _multiplied(trace, call, a if weight_is_left else b, out.numel() * a.shape[-1])
    if weight_is_left:
        _ends(trace, call, b, b_in, a, a_in)
        vertical = bias if bias is not None and bias.dim() > 1 else None
        axes |= _made(trace, call, a, axes.get(a_in - 1), vertical, a_in - 1)
        axes |= {out.dim() - 1: made} if made is not None else {}
    else:
        _ends(trace, call, a, a_in, b, b_in)
        axes |= _made(trace, call, b, made, bias, out.dim() - 1)
    trace.put(out, Label(axes, note))


def _factors(call: Call) -> tuple[Tensor, Tensor, Tensor | None, int, int]:
    """a, b, what is added, and the axes of b that are read and written."""
    match call.name.removeprefix("aten::"):
        case "linear":
            return call["input"], call["weight"], call["bias"], 1, 0
        case "addmm":
            return call["mat1"], call["mat2"], call["self"], 0, 1
        case "baddbmm":
            return call["batch1"], call["batch2"], call["self"], 1, 2
        case _:
            return call["self"], call["mat2"], None, call["mat2"].dim() - 2, call["mat2"].dim() - 1


def _meet(trace: Trace, call: Call, *places: tuple[Tensor, int]) -> None:
    """Computed values are multiplied with computed values: channels that are summed over go with those they meet."""
    labels = [(trace.label(tensor), axis) for tensor, axis in places]
    known = [label.axes[axis] for label, axis in labels if label and axis in label.axes]
    if known:
        trace.meet()
    if len(known) == 2:
        trace.unite(known[0], known[1], call)
        trace.end(call, known[0])
    for ids in known if len(known) == 1 else ():
        trace.freeze(ids, call, "the channels are multiplied with computed values that are no channels")


@rule("aten::_trilinear", kind="contract")
def bilinear(trace: Trace, call: Call) -> None:
    """nn.Bilinear: x [N, I] and y [N, J] times W [O, I, J]. Other sums over three factors are not followed."""
    x, weight, y = call.tensors
    weights = trace.label(weight)
    if [call[name] for name in ("expand1", "expand2", "expand3", "sumdim")] != [[1, 3], [0], [1, 2], [2, 3]]:
        barrier(trace, call)
        return
    _multiplied(trace, call, weight, len(x) * weight.numel())
    _ends(trace, call, x, 1, weight, 1)
    _ends(trace, call, y, 1, weight, 2)
    rows = trace.join_along(call, [(x, 0), (y, 0)])
    axes = {0: rows} if rows is not None else {}
    axes |= _made(trace, call, weight, weights.axes.get(0) if weights else None, None, 1)
    notes = [label.note for label in map(trace.label, call.tensors) if label and label.note]
    trace.put(call.outputs[0], Label(axes, next(iter(notes), None)))


@rule("aten::embedding", kind="contract")
def embedding(trace: Trace, call: Call) -> None:
    """Looked up, not multiplied: the table's columns are new channels, its rows are words, not channels."""
    out, table = call.outputs[0], trace.label(call["weight"])
    if table is not None:
        axes = _made(trace, call, call["weight"], table.axes.get(1), None, out.dim() - 1)
        trace.put(out, Label(axes, table.note))


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math_for_mps",
    kind="contract",
)  # fmt: skip
def attention(trace: Trace, call: Call) -> None:
    """q, k [..., L or S, E], v [..., S, F]: heads are batch axes; within a head channels of q meet those of k."""
    q, k, v = call["query"], call["key"], call["value"]
    bias = next((call.get(name) for name in ("attn_mask", "attn_bias") if call.get(name) is not None), None)
    labels = [trace.label(tensor) for tensor in (q, k, v)]
    if all(label is None for label in labels):
        return
    out, last = call.outputs[0], q.dim() - 1
    if any(label is not None and last in label.axes for label in labels[:2]):
        trace.meet()
        reached = trace.join_along(call, [(q, last), (k, last)])
        if reached is not None and call.get("scale") is None:
            trace.freeze(reached, call, "the scale of attention depends on how many channels a head has")
        elif reached is not None:
            trace.end(call, reached)
    axes = {}
    for axis in range(last - 1):
        ids = trace.join_along(call, [(t, axis - q.dim() + t.dim()) for t in (q, k, v, bias) if t is not None])
        if ids is not None:
            axes[axis] = ids
    for label in labels[1:]:
        if label is not None and last - 1 in label.axes:
            trace.freeze(label.axes[last - 1], call, "attention sums over these positions")
    if labels[0] is not None and last - 1 in labels[0].axes:
        axes[last - 1] = labels[0].axes[last - 1]
    if labels[2] is not None and last in labels[2].axes:
        trace.meet()
        axes[last] = labels[2].axes[last]
    note = next((label.note for label in labels if label and label.note), None)
    trace.put(out, Label(axes, note))


# --- the two sides of a weight ----------------------------------------------------------------------------------------


def _ends(trace: Trace, call: Call, x: Tensor, x_axis: int, weight: Tensor, weight_axis: int) -> None:
    """The channels of x end here: tie them to the weight's input entries and note the consumer."""
    label, weights = trace.label(x), trace.label(weight)
    read = label.axes.get(x_axis) if label else None
    own = weights.axes.get(weight_axis) if weights else None
    if own is not None:
        trace.slots.set_role(own, "in")
    if weights is None or weights.source is None or own is None:
        if read is not None:
            why = "the channels are multiplied with computed values, not with a weight of the network"
            trace.freeze_as(read, weights.note if weights else None, call, why)
        if own is not None:
            trace.freeze(own, call, "the weight is computed from other values")
    elif read is None:
        trace.freeze_as(own, label.note if label else None, call, NOT_A_CHANNEL)
    else:
        trace.freeze_as(own[read == 0], label.note if label else None, call, NOT_A_CHANNEL)
        trace.unite(read, own, call)
        trace.consume(call, weights.source, read, 1 if "convolution" in call.name else -1)


def _made(trace: Trace, call: Call, weight: Tensor, made: Ids | None, bias: Tensor | None, axis: int) -> dict[int, Ids]:
    """Label of the new channels along `axis` of the result, with their bias."""
    weights = trace.label(weight)
    if made is not None and weights is not None and weights.source is not None:
        trace.slots.set_role(made, "out")
    if bias is None:
        return {} if made is None else {axis: made}
    known = trace.label(bias)
    own = known.axes.get(bias.dim() - 1) if known else None
    if bias.shape[-1] == 1:  # one output, or one bias for all of them
        return {} if made is None else {axis: made}
    if made is None or own is None:
        for ids in (made, own):
            if ids is not None:
                trace.freeze(ids, call, "the bias or the weight is computed from other values")
        return {}
    trace.unite(made, own, call)
    return {axis: merge([made, own])}


def _multiplied(trace: Trace, call: Call, weight: Tensor, macs: int) -> None:
    label = trace.label(weight)
    if label is not None and label.source is not None:
        trace.macs[label.source] = trace.macs.get(label.source, 0) + macs
