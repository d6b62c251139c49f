"""Rules for elementwise operations, data movement and windows over space, and for what cannot be followed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from pipeline.models.trace.labels import Ids, Label, core
from pipeline.models.trace.sizes import sliced_axes
from pipeline.models.trace.table import Call, rule

if TYPE_CHECKING:
    from pipeline.models.trace.tracer import Trace

WRITTEN = "values are written into a part of a tensor"
DECIDES = "the code decides by computed values, and a cut could make it decide otherwise"

# --- join: labels that meet in one element ----------------------------------------------------------------------------


@rule("aten::hardswish", "aten::_prelu_kernel", "aten::rrelu", kind="join")
def join(trace: Trace, call: Call) -> None:
    """Pointwise operations, among them those that torch forgot to tag."""
    label = trace.join(call, call.tensors)
    for out in call.outputs:
        trace.put(out, label)


@rule("aten::zeros_like", "aten::ones_like", "aten::empty_like", "aten::full_like", kind="join")
def like(trace: Trace, call: Call) -> None:
    """A fresh tensor that follows the shape of another loses channels when that one does."""
    label = trace.label(call.tensors[0])
    trace.put(call.outputs[0], label and Label(label.axes, label.note))


@rule(
    "aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty", "aten::new_empty_strided", "aten::zeros",
    "aten::ones", "aten::full", "aten::empty",
    kind="join",
)  # fmt: skip
def fresh(trace: Trace, call: Call) -> None:
    """A fresh tensor of a stated shape is the same everywhere: it may follow the channels that it meets."""
    trace.set_same_everywhere(call.outputs[0])


@rule("aten::fill", "aten::zero", kind="join")
def fill(trace: Trace, call: Call) -> None:
    trace.put(call.outputs[0], trace.join(call, call.tensors, shape=call.outputs[0].shape))


@rule("aten::copy", kind="join")
def copy(trace: Trace, call: Call) -> None:
    """Writing a whole tensor is a join, and so is writing all channels into a part of space; other parts are not followed."""
    target, source = call.tensors
    base = target._base
    if base is not None:
        axes = {axis for tensor in (base, target, source) for axis in (trace.label(tensor) or Label()).axes}
        same_axes = base.dim() == target.dim() == source.dim()
        if axes and same_axes and all(_size(target, axis) == _size(base, axis) for axis in axes):
            joined = {axis: trace.join_along(call, [(base, axis), (source, axis)]) for axis in axes}
            label = Label({a: ids for a, ids in joined.items() if ids is not None}, trace.reason(call, WRITTEN))
            trace.put(base, label)
            trace.put(target, label)
        else:
            barrier(trace, call, WRITTEN)
    elif trace.label(target) is None:
        trace.put(call.outputs[0], trace.join(call, call.tensors[1:], shape=target.shape))
    else:
        join(trace, call)


def _size(x: Tensor, axis: int) -> tuple[int, int]:
    return x.shape[axis], x.stride(axis)


# --- move: the operation runs on the labels themselves ----------------------------------------------------------------


@rule(
    "aten::clone", "aten::_to_copy", "aten::contiguous", "aten::lift_fresh", "aten::detach", "aten::alias",
    kind="move",
)  # fmt: skip
def same(trace: Trace, call: Call) -> None:
    trace.put(call.outputs[0], trace.label(call.tensors[0]))


@rule(
    "aten::permute", "aten::transpose", "aten::t", "aten::numpy_T", "aten::unsqueeze", "aten::squeeze", "aten::expand",
    "aten::flip", "aten::movedim", "aten::repeat", "aten::rot90",
    kind="move",
)  # fmt: skip
def move(trace: Trace, call: Call) -> None:
    """The operation itself runs on the labels."""
    trace.move(call, lambda plane: call.func(plane, *call.args[1:], **call.kwargs))


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias", kind="move")
def reshape(trace: Trace, call: Call) -> None:
    """Axes may merge (flatten before a classifier) and split: then the same offset goes in each of the outer parts."""
    trace.move(call, lambda plane: plane.reshape(call.outputs[0].shape))


@rule("aten::as_strided", kind="move")
def as_strided(trace: Trace, call: Call) -> None:
    """Adaptive pooling of channels_last values corrects strides with it; other uses are not followed."""
    if list(call["size"]) == list(call.tensors[0].shape) and call.func._schema.is_mutable:
        trace.put(call.outputs[0], trace.label(call.tensors[0]))
    else:
        barrier(trace, call, "as_strided addresses memory, not channels")


@rule("aten::cat", kind="move")
def cat(trace: Trace, call: Call) -> None:
    out, parts = call.outputs[0], [part for part in call["tensors"] if part.numel()]
    dim = call["dim"] % out.dim()
    labels = [trace.label(part) for part in parts]
    if all(label is None for label in labels):
        return
    joined = trace.join(call, parts, shape=out.shape, skip=dim) or Label()
    known = [label.axes.get(dim) if label else None for label in labels]
    axes = dict(joined.axes)
    if any(ids is not None for ids in known):
        sizes = [part.shape[dim] for part in parts]
        axes[dim] = np.concatenate([zeros(n) if ids is None else ids for ids, n in zip(known, sizes, strict=True)])
    trace.put(out, Label(axes, joined.note))


@rule("aten::stack", kind="move")
def stack(trace: Trace, call: Call) -> None:
    dim = call["dim"] % call.outputs[0].dim()
    joined = trace.join(call, call["tensors"])
    trace.put(call.outputs[0], joined and replace(joined, axes={a + (a >= dim): ids for a, ids in joined.axes.items()}))


@rule("aten::constant_pad_nd", kind="move")
def pad(trace: Trace, call: Call) -> None:
    """Padding along channels makes positions that stay; so do the channels of others that meet them."""
    label = trace.label(call["self"])
    if label is None:
        return
    axes = dict(label.axes)
    for i, (before, after) in enumerate(zip(call["pad"][::2], call["pad"][1::2], strict=True)):
        axis = call["self"].dim() - 1 - i
        if axis not in axes or before == after == 0:
            continue
        if before < 0 or after < 0:
            trace.freeze(axes.pop(axis), call, "channels are cropped by their position")
        else:
            axes[axis] = np.concatenate([zeros(before), axes[axis], zeros(after)])
    trace.put(call.outputs[0], Label(axes, label.note))


@rule("aten::select", "aten::unbind", "aten::diagonal", kind="move")
def part(
    trace: Trace, call: Call, text: str = "channels are taken by their position, which is a number in the code"
) -> None:
    """Parts along an axis without channels; channels that are taken by their position stay, all of them."""
    label = trace.label(call["self"])
    if label is None:
        return
    for name in ("dim", "dim1", "dim2"):
        dim = call.get(name)
        if dim is not None and dim % call["self"].dim() in label.axes and call.outputs[0].shape != call["self"].shape:
            trace.freeze(label.axes[dim % call["self"].dim()], call, text)
    move(trace, call)


@rule("aten::slice", kind="move")
def slice_(trace: Trace, call: Call) -> None:
    """Exact, where the source says where the slice begins and ends: surgery can change that. Elsewhere, one of n equal parts
    may follow the number of channels (`x[:, : x.shape[1] // n]`) if they all lose the same."""
    label = trace.label(call["self"])
    ids = label.axes.get(call["dim"] % call["self"].dim()) if label else None
    if ids is None:
        move(trace, call)
        return
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(len(ids))
    if step != 1 or not (states_slice(trace, ids, start, stop) or _tie_parts(trace, call, ids, start, stop)):
        part(trace, call)
    else:
        move(trace, call)


def _tie_parts(trace: Trace, call: Call, ids: Ids, start: int, stop: int) -> bool:
    """Tie the equal parts of which the slice is one; False if it is none."""
    length = stop - start
    if length <= 0 or len(ids) % length or start % length:
        return False
    tie_rows(trace, call, ids.reshape(-1, length))
    return True


def states_slice(trace: Trace, ids: Ids, start: int, stop: int) -> bool:
    """Can the bounds of a slice of these channels be found in the source?"""
    python = trace.python
    if (start, stop) == (0, len(ids)):
        return True
    if python is None or not python.tensors:
        return False
    x = python.tensors[0]
    label = trace.label(x)
    if python.name == "narrow" and len(python.args) == 4:
        return label is not None and all(python.resolves(trace, (i,)) for i in (2, 3))
    for axis, position, given in sliced_axes(x, python.args[1]) if python.name == "__getitem__" else ():
        there = label.axes.get(axis) if label else None
        if there is not None and np.array_equal(there, ids) and given.indices(len(ids)) == (start, stop, 1):
            sides = [side for side, bound in (("lower", given.start), ("upper", given.stop)) if bound is not None]
            return all(python.resolves(trace, (position, side)) for side in sides)
    return False


@rule("aten::split", "aten::split_with_sizes", kind="tie")
def split(trace: Trace, call: Call) -> None:
    """Equal parts (`chunk`, or one size for all) lose the same offset in each; parts whose sizes the source lists are exact."""
    label = trace.label(call["self"])
    ids = None if label is None else label.axes.get(call["dim"] % call["self"].dim())
    python, parts = trace.python, call.outputs
    if ids is None or python is None or len(parts) == 1:
        move(trace, call)
        return
    listed = call.name.endswith("with_sizes")
    if listed and python.name == "split" and all(python.resolves(trace, (1, i)) for i in range(len(parts))):
        move(trace, call)
    elif len({piece.shape for piece in parts}) == 1:
        tie_rows(trace, call, ids.reshape(len(parts), -1))
        move(trace, call)
    else:
        part(trace, call)


@rule("aten::index", "aten::index_select", "aten::gather", kind="move")
def picked(trace: Trace, call: Call) -> None:
    """Positions along one or more axes are picked by index tensors; channels among them stay, others pass."""
    label = trace.label(call["self"])
    indices = call.get("indices") or {call["dim"] % call["self"].dim(): call["index"]}
    chosen = dict(indices if isinstance(indices, dict) else enumerate(indices))
    chosen = {axis: index for axis, index in chosen.items() if index is not None}
    if any(not index.dtype.is_signed or index.dtype.is_floating_point for index in chosen.values()):
        barrier(trace, call, "values are chosen by a mask")
        return
    for index in chosen.values():
        for ids in (trace.label(index) or Label()).axes.values():
            trace.freeze(ids, call, "positions are read from these values")
    if label is not None:
        for axis in chosen:
            if axis in label.axes:
                trace.freeze(label.axes[axis], call, "channels are picked by their position, which an index states")
        move(trace, call)


@rule("aten::glu", kind="tie")
def glu(trace: Trace, call: Call) -> None:
    label = trace.label(call["self"])
    if label is None:
        return
    dim, axes = call["dim"] % call["self"].dim(), dict(label.axes)
    if dim in axes:
        axes[dim] = tie_rows(trace, call, axes[dim].reshape(2, -1))
    trace.put(call.outputs[0], Label(axes, label.note))


@rule("aten::channel_shuffle", "aten::native_channel_shuffle", kind="tie")
def channel_shuffle(trace: Trace, call: Call) -> None:
    shape, groups = call.outputs[0].shape, call["groups"]

    def run(plane: Tensor) -> Tensor:
        split_up = plane.reshape(shape[0], groups, -1, *shape[2:])
        return tied(trace, call, split_up).transpose(1, 2).reshape(shape)

    trace.move(call, run)


@rule("aten::pixel_shuffle", kind="tie")
def pixel_shuffle(trace: Trace, call: Call) -> None:
    """A channel of the result owns the r * r channels that it is woven from."""
    _blocks_to_channels(trace, call, 2, call["upscale_factor"] ** 2)


@rule("aten::col2im", kind="window")
def col2im(trace: Trace, call: Call) -> None:
    """[N, C * window, positions] -> [N, C, H, W]: all of a window goes together."""
    _blocks_to_channels(trace, call, 1, math.prod(call["kernel_size"]))


@rule("aten::pixel_unshuffle", kind="move")
def pixel_unshuffle(trace: Trace, call: Call) -> None:
    """A channel becomes r * r."""
    _channels_to_blocks(trace, call, 2, call["downscale_factor"] ** 2)


@rule("aten::im2col", kind="window")
def im2col(trace: Trace, call: Call) -> None:
    """[N, C, H, W] -> [N, C * window, positions]."""
    _channels_to_blocks(trace, call, 2, math.prod(call["kernel_size"]))


def _blocks_to_channels(trace: Trace, call: Call, num_spatial: int, size: int) -> None:
    """Each `size` consecutive channels, before the spatial axes, become one."""
    label = trace.label(call["self"])
    if label is not None:
        axes, axis = without_space(trace, call, label, num_spatial), call["self"].dim() - 1 - num_spatial
        if axis in axes:
            axes[axis] = tie_rows(trace, call, axes[axis].reshape(-1, size).T)
        trace.put(call.outputs[0], Label(axes, label.note))


def _channels_to_blocks(trace: Trace, call: Call, num_spatial: int, size: int) -> None:
    """Each channel, before the spatial axes, becomes `size` consecutive ones."""
    label = trace.label(call["self"])
    if label is not None:
        axes, axis = without_space(trace, call, label, num_spatial), call["self"].dim() - 1 - num_spatial
        if axis in axes:
            axes[axis] = np.repeat(axes[axis], size)
        trace.put(call.outputs[0], Label(axes, label.note))


@rule(
    "aten::roll",
    "aten::sort",
    "aten::topk",
    "aten::unfold",
    "aten::argsort",
    "aten::triu",
    "aten::tril",
    kind="barrier",
)
def along_one_axis(trace: Trace, call: Call) -> None:
    """Nothing happens to channels unless they lie on the axis that the operation works along."""
    over_axis(trace, call, "works along the channels by their position")


# --- windows over space -----------------------------------------------------------------------------------------------


@rule(
    "aten::max_pool2d_with_indices", "aten::max_pool2d", "aten::mkldnn_max_pool2d", "aten::avg_pool2d",
    "aten::_adaptive_avg_pool2d", "aten::adaptive_avg_pool2d",
    "aten::upsample_nearest2d", "aten::_upsample_nearest_exact2d", "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d", "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa",
    "aten::reflection_pad2d", "aten::replication_pad2d", "aten::grid_sampler_2d", "aten::adaptive_max_pool2d",
    kind="window",
)  # fmt: skip
def window2d(trace: Trace, call: Call) -> None:
    window(trace, call, 2)


@rule(
    "aten::max_pool1d", "aten::avg_pool1d", "aten::adaptive_avg_pool1d", "aten::adaptive_max_pool1d",
    "aten::upsample_nearest1d", "aten::upsample_linear1d", "aten::reflection_pad1d", "aten::replication_pad1d",
    kind="window",
)  # fmt: skip
def window1d(trace: Trace, call: Call) -> None:
    window(trace, call, 1)


@rule(
    "aten::max_pool3d_with_indices", "aten::avg_pool3d", "aten::_adaptive_avg_pool3d", "aten::adaptive_max_pool3d",
    "aten::upsample_nearest3d", "aten::upsample_trilinear3d", "aten::replication_pad3d",
    kind="window",
)  # fmt: skip
def window3d(trace: Trace, call: Call) -> None:
    window(trace, call, 3)


def window(trace: Trace, call: Call, num_spatial: int) -> None:
    """The last `num_spatial` axes are space: labels there are frozen, others pass."""
    label = trace.label(call.tensors[0])
    if label is not None:
        axes = without_space(trace, call, label, num_spatial)
        for out in call.outputs:
            trace.put(out, Label(axes, label.note))


def without_space(trace: Trace, call: Call, label: Label, num_spatial: int) -> dict[int, Ids]:
    axes = dict(label.axes)
    for axis in [axis for axis in axes if axis >= call.tensors[0].dim() - num_spatial]:
        trace.freeze(axes.pop(axis), call, "a window slides over the channels")
    return axes


# --- what has no channels to follow -----------------------------------------------------------------------------------


def barrier(trace: Trace, call: Call, text: str = "there is no rule for this operation") -> None:
    """Freeze every channel that reaches the operation; what comes out remembers why it carries none."""
    reached = False
    for tensor in call.tensors:
        label = trace.label(tensor)
        if label is not None:
            reached = True
            for ids in label.axes.values():
                trace.freeze(ids, call, text)
    if reached:
        note = trace.reason(call, text)
        for out in call.outputs:
            trace.put(out, Label(note=note))


@rule(
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::is_nonzero",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive",
    kind="refuse",
)  # fmt: skip
def reads_values(trace: Trace, call: Call) -> None:
    """Python sees a value that a cut may change: what the code would then do was not traced, so nothing may be cut."""
    if any(trace.label(tensor) is not None for tensor in call.tensors):
        trace.refuse(call.name, DECIDES)


# --- for rules --------------------------------------------------------------------------------------------------------


def axes_of(call: Call, x: Tensor) -> set[int]:
    """Axes that the operation works along (`dim`, `dims`, `dimension`); all of them if it names none."""
    given = next((call.get(name) for name in ("dim", "dims", "dimension") if call.get(name) is not None), None)
    dims = range(x.dim()) if given is None or given == [] else [given] if isinstance(given, int) else given
    return {dim % x.dim() for dim in dims} if x.dim() else set()


def over_axis(trace: Trace, call: Call, text: str) -> None:
    """Operation along the axes `dim` (or `dims`, `dimension`): channels there are frozen, all others pass."""
    x = call.tensors[0]
    label = trace.label(x)
    if label is None:
        return
    for axis in axes_of(call, x) & {*label.axes}:
        trace.freeze(label.axes[axis], call, text)
    for out in call.outputs:
        fits = {axis: ids for axis, ids in label.axes.items() if axis < out.dim() and out.shape[axis] == len(ids)}
        trace.put(out, Label(fits, label.note))


def tied(trace: Trace, call: Call, plane: Tensor) -> Tensor:
    """The plane after tying it along all axes on which it varies but one (`Trace.free_axis`)."""
    small = core(plane)
    varying = [axis for axis, size in enumerate(small.shape) if size > 1]
    if len(varying) < 2:
        return small.expand(plane.shape)
    free = trace.free_axis(varying, small.shape)
    first = small
    for axis in varying:
        if axis != free:
            first = first.narrow(axis, 0, 1)
    trace.unite(flat(first.expand(small.shape)), flat(small), call)
    if trace.python is not None:
        trace.python.tied |= {*varying} - {free}
    return first.expand(plane.shape)


def tie_rows(trace: Trace, call: Call, rows: Ids) -> Ids:
    """The same position in each row goes together; the first row, which stands for them."""
    for row in rows[1:]:
        trace.unite(rows[0], row, call)
    return rows[0].copy()


def flat(plane: Tensor) -> Ids:
    return np.ascontiguousarray(plane.reshape(-1).numpy())


def zeros(size: int) -> Ids:
    return np.zeros(size, dtype=np.int64)


def merge(planes: Sequence[Ids]) -> Ids:
    """The first slot that is known for each position."""
    result = planes[0]
    for other in planes[1:]:
        result = np.where(result > 0, result, other)
    return result
