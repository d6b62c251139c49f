"""Surgery: a dense network and a plan become a smaller dense network.

Only entries move: every parameter and buffer that the plan names keeps the listed entries of the listed dimensions, a
residual block that it removes gives place to a module that hands on what it gets (`models.standalone.Removed`), and
the integers that modules remember about their own sizes (`out_channels`, `groups`, `num_heads` ...) follow by the rules
in `ATTRIBUTES`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from pipeline.models import standalone
from pipeline.models.graph import Size
from pipeline.models.modes import caches
from pipeline.pruning.plan import Plan

Slices = Mapping[str, Mapping[int, Tensor]]
"""tensor name -> dimension -> kept entries (int64, ascending)."""


class PlanMismatch(ValueError):
    """The plan was made for another network; the message names the tensors that do not fit."""


# --- what modules remember about their sizes ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Follows:
    """`attribute` shrinks in proportion to dimension `dim` of the first of `tensors` that the module has."""

    attribute: str
    tensors: tuple[str, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """`attribute` counts the equal blocks that `dim` is divided into; a block without entries no longer counts.

    A grouped convolution loses whole groups (fewer groups) or the same offsets in each (as many, narrower ones).
    """

    attribute: str
    tensors: tuple[str, ...]
    dim: int


@dataclass(frozen=True, slots=True)
class Times:
    """`attribute` is the size of `dim` times another attribute, which an earlier rule has brought up to date."""

    attribute: str
    tensors: tuple[str, ...]
    dim: int
    factor: str


@dataclass(frozen=True, slots=True)
class Shape:
    """`attribute` is the whole shape of the tensor, as a tuple."""

    attribute: str
    tensors: tuple[str, ...]


Rule = Follows | Blocks | Times | Shape

_WEIGHT = ("weight",)

ATTRIBUTES: dict[str, tuple[Rule, ...]] = {
    "torch.nn.modules.conv._ConvNd": (
        Blocks("groups", _WEIGHT, 0),
        Follows("out_channels", _WEIGHT, 0),
        Times("in_channels", _WEIGHT, 1, "groups"),
    ),
    "torch.nn.modules.conv._ConvTransposeNd": (
        Blocks("groups", _WEIGHT, 0),
        Follows("in_channels", _WEIGHT, 0),
        Times("out_channels", _WEIGHT, 1, "groups"),
    ),
    "torch.nn.modules.linear.Linear": (Follows("out_features", _WEIGHT, 0), Follows("in_features", _WEIGHT, 1)),
    "torch.nn.modules.linear.Bilinear": (
        Follows("out_features", _WEIGHT, 0),
        Follows("in1_features", _WEIGHT, 1),
        Follows("in2_features", _WEIGHT, 2),
    ),
    "torch.nn.modules.sparse.Embedding": (Follows("num_embeddings", _WEIGHT, 0), Follows("embedding_dim", _WEIGHT, 1)),
    "torch.nn.modules.batchnorm._NormBase": (Follows("num_features", ("weight", "running_mean"), 0),),
    "torch.nn.modules.normalization.GroupNorm": (
        Blocks("num_groups", _WEIGHT, 0),
        Follows("num_channels", _WEIGHT, 0),
    ),
    "torch.nn.modules.normalization.LayerNorm": (Shape("normalized_shape", _WEIGHT),),
    "torch.nn.modules.normalization.RMSNorm": (Shape("normalized_shape", _WEIGHT),),
    "torch.nn.modules.activation.PReLU": (Follows("num_parameters", _WEIGHT, 0),),
    "timm.layers.norm.RmsNorm": (Shape("normalized_shape", _WEIGHT),),
}
"""Qualified class name -> what follows the shapes of its tensors. The most specific class of a module decides.

Add your own here. Names are text, so that a class of a library that is not installed can stand here too; a tensor may
be a child's (`proj.weight`)."""


def rules_for(module: nn.Module) -> tuple[Rule, ...]:
    """The rules of the most specific class of `module` that has any."""
    for cls in type(module).__mro__:
        rules = ATTRIBUTES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rules is not None:
            return rules
    return ()


# --- the cut --------------------------------------------------------------------------------------------------------


def cut(model: nn.Module, plan: Plan) -> nn.Module:
    """A smaller copy of `model` that holds only what `plan` keeps. `model` stays as it is, bit for bit.

    Tied parameters stay one object, parametrised weights are cut at their originals; dtype, device, requires_grad and
    memory format are kept; `.grad` is None.

    Raises:
        PlanMismatch: the plan names tensors that the model lacks, or entries that they do not have.
    """
    check_plan(model, plan)
    gone, blocks = plan.removed_tensors(), [block.name for block in plan.blocks]
    small = cut_slices(model, {name: dims for name, dims in plan.slices().items() if name not in gone}, blocks)
    kept = plan.kept_by_group()
    sizes = [size for size in plan.sizes if not any(f"{size.module}.".startswith(f"{name}.") for name in blocks)]
    update_sizes_(model, small, [(size, size.value(kept)) for size in sizes])
    return small


def cut_slices(model: nn.Module, slices: Slices, removed_blocks: Collection[str] = ()) -> nn.Module:
    """`cut` for slices and names of blocks that are already known to fit the model."""
    kept = _kept_by_tensor(model, slices)
    sources = {id(tensor): tensor for _, tensor in named_tensors(model)}
    # What the memo already holds, deepcopy takes as it is: the large tensors are never copied whole, and all places
    # that share one parameter get the same smaller one.
    memo: dict[int, Any] = {key: sliced(sources[key], dims) for key, dims in kept.items()}
    memo |= {id(model.get_submodule(name)): standalone.Removed() for name in removed_blocks}
    small = copy.deepcopy(model, memo)
    for tensor in (*small.parameters(), *small.buffers()):
        tensor.grad = None
    for cache in list(caches(small)):
        cache.clear()
    _update_attributes(model, small, kept)
    return small


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every parameter and buffer, also the second name of a tied one."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def sliced(tensor: Tensor, kept: Mapping[int, Tensor]) -> Tensor:
    """New tensor with the kept entries of each dimension; the order of dimensions in memory (channels_last) stays."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
    data = tensor.detach().permute(order)
    for dim, entries in kept.items():
        data = data.index_select(order.index(dim), entries.to(data.device))
    data = data.permute([order.index(dim) for dim in range(tensor.dim())])
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data


def _kept_by_tensor(model: nn.Module, slices: Slices) -> dict[int, dict[int, Tensor]]:
    """id of the tensor -> dimension -> kept entries; the names of a tied tensor have to agree."""
    tensors = dict(named_tensors(model))
    kept: dict[int, dict[int, Tensor]] = {}
    for name, dims in slices.items():
        merged = kept.setdefault(id(tensors[name]), {})
        for dim, entries in dims.items():
            if dim in merged and not torch.equal(merged[dim], entries):
                raise PlanMismatch(
                    f"{name} is tied to another parameter, and the plan keeps other entries of dimension {dim} under "
                    "that name. Trace the network again: tied parameters belong to one group."
                )
            merged[dim] = entries
    return kept


# --- does the plan fit ----------------------------------------------------------------------------------------------


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise PlanMismatch if `plan` was made for a network with other tensors or other sizes than `model` has."""
    tensors = dict(named_tensors(model))
    problems: list[str] = []
    order = {name: i for i, name in enumerate(tensors)}
    for name in sorted(plan.shapes, key=lambda name: order.get(name, len(order))):  # as the reader knows the network
        tensor, shape = tensors.get(name), plan.shapes[name]
        if tensor is None:
            problems.append(f"{name} {tuple(shape)} is not in the model")
        elif nn.parameter.is_lazy(tensor):
            problems.append(f"{name} is lazy and has no shape yet: run one batch first")
        elif tuple(tensor.shape) != tuple(shape):
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the plan was made for {tuple(shape)}")
    if problems:
        raise PlanMismatch(_message(problems))


def _message(problems: list[str]) -> str:
    shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    return (
        f"the plan does not fit this model: {shown}. A plan can be replayed on the network that it was traced from: "
        "the same factory with the same arguments, not yet cut. Trace and plan this model anew, or build the model "
        "that the plan was made for."
    )


# --- module attributes ----------------------------------------------------------------------------------------------


def _update_attributes(dense: nn.Module, small: nn.Module, kept: Mapping[int, Mapping[int, Tensor]]) -> None:
    """Bring the sizes that modules remember up to date in `small`; `dense` tells what they were."""
    small_modules = dict(small.named_modules())
    for name, module in dense.named_modules():
        for rule in rules_for(module) if name in small_modules else ():
            source, small_module = _source(module, rule.tensors), small_modules[name]
            if source is not None and id(source) in kept and hasattr(module, rule.attribute):
                old = getattr(module, rule.attribute)
                setattr(small_module, rule.attribute, _value(rule, name, old, source, kept[id(source)], small_module))
    _update_head(dense, small)


def _source(module: nn.Module, names: tuple[str, ...]) -> Tensor | None:
    """The first of the named tensors that exists; of a parametrised one, its largest original."""
    for name in names:
        *path, leaf = name.split(".")
        owner: Any = module
        for part in path:
            owner = getattr(owner, part, None)
        if not isinstance(owner, nn.Module):
            continue
        if parametrize.is_parametrized(owner, leaf):
            originals: Any = owner.parametrizations
            # weight_norm has a length per row and a direction: the direction has the weight's shape.
            return max(originals[leaf].parameters(recurse=False), key=torch.numel)
        tensor = owner._parameters.get(leaf, owner._buffers.get(leaf))
        if tensor is not None:
            return tensor
    return None


def _value(rule: Rule, module: str, old: Any, source: Tensor, kept: Mapping[int, Tensor], small: nn.Module) -> Any:
    """What the attribute becomes; `old` if the dimensions that it depends on lose nothing."""
    sizes = [len(kept[dim]) if dim in kept else size for dim, size in enumerate(source.shape)]
    match rule:
        case Shape():
            return tuple(sizes)
        case Times():
            return sizes[rule.dim] * getattr(small, rule.factor)
        case Follows():
            return _proportional(module, rule.attribute, old, sizes[rule.dim], source.shape[rule.dim])
        case Blocks():
            return _blocks(module, rule.attribute, old, kept.get(rule.dim), source.shape[rule.dim])


def _proportional(module: str, attribute: str, old: int, kept: int, size: int) -> int:
    new, rest = divmod(old * kept, size)
    if rest:
        raise PlanMismatch(
            f"{module}.{attribute} is {old} for {size} entries; {kept} of them are kept, which is no whole number. "
            "Freeze this group with Graph.without."
        )
    return new


def _blocks(module: str, attribute: str, old: int, entries: Tensor | None, size: int) -> int:
    if entries is None or old == 1:
        return old
    counts = torch.bincount(entries // (size // old), minlength=old)
    remaining = counts[counts > 0]
    if bool((remaining != remaining[0]).any()):
        raise PlanMismatch(
            f"{module} has {attribute}={old} blocks of {size // old}, and the plan keeps {counts.tolist()} entries of "
            "them. Blocks go whole, or lose the same number each. Freeze this group with Graph.without."
        )
    return len(remaining)


def update_sizes_(dense: nn.Module, small: nn.Module, sizes: Iterable[tuple[Size, int]]) -> None:
    """Let the code of `small` state these numbers: in attributes, or in copies of the methods that state them."""
    edits: dict[str, list[standalone.Edit]] = {}
    for size, value in sizes:
        module = small.get_submodule(size.module)
        if not size.attribute:
            edits.setdefault(size.module, []).append([list(size.functions), size.line, size.column, size.text, value])
        elif size.element is None:
            setattr(module, size.attribute, value)
        else:
            numbers = getattr(module, size.attribute)
            changed = [*numbers[: size.element], value, *numbers[size.element + 1 :]]
            setattr(module, size.attribute, type(numbers)(changed))
    for path, own in edits.items():
        module, places = small.get_submodule(path), [edit[:4] for edit in own]
        earlier = [edit for edit in standalone.edits_of(dense.get_submodule(path)) if [*edit[:4]] not in places]
        standalone.rewrite_(module, [*earlier, *own])


def _update_head(dense: nn.Module, small: nn.Module) -> None:
    """timm models remember the width before the classifier, and build a new head from it for other classes."""
    get_classifier = getattr(dense, "get_classifier", None)
    if not callable(get_classifier):
        return
    old, new = get_classifier(), small.get_classifier()  # type: ignore[operator]
    if not isinstance(old, nn.Linear) or old.in_features == new.in_features:
        return
    for attribute in ("num_features", "head_hidden_size"):
        if getattr(dense, attribute, None) == old.in_features:
            setattr(small, attribute, new.in_features)
