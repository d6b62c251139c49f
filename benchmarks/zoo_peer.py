"""Torch-Pruning on one architecture of the zoo, as its examples for timm and torchvision use it (`benchmarks.zoo_one` runs it).

What its examples do is done: the classifier is ignored, the layers that make queries, keys and values come with their number of heads,
attention modules and torchvision's ViT learn their new widths afterwards, attention is not fused. Each layer gets its own random ratio, by
`pruning_ratio_dict`, and random importances.

Which elements it removed is read off the network: before it prunes, every element is replaced by its own position, and what is left
afterwards are the positions of the elements that stay.
"""

from __future__ import annotations

import copy
import random
import re
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from benchmarks.measuring import peak_memory
from benchmarks.zoo_list import NUM_CLASSES, Architecture
from benchmarks.zoo_one import (
    Coverage,
    Record,
    Refused,
    check_backward,
    check_equal,
    check_forward,
    dense,
    randomise,
)

MIN_REMOVED, MAX_REMOVED = 0.05, 0.8
"""Range of the fraction of its channels that a layer loses."""
QUERY_KEY_VALUE = (("qkv",), ("qkv_proj",), ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("q", "kv"))
"""Names of the layers of an attention module whose outputs are divided among its heads."""
SPANNING = re.compile("LayerNorm|GroupNorm|RmsNorm|RMSNorm|SimpleNorm|EvoNorm|FilterResponseNorm|ResponseNorm|StdConv")
"""Modules that compute a statistic over channels: there, a channel of zeros is something else than no channel."""


def peer(architecture: Architecture, record: Record, timeout_s: float) -> None:
    """Graph, pruning at random ratios, forward, backward, equality where it is defined."""
    warnings.simplefilter("ignore")
    model, images = dense(architecture, record)
    attention = attention_layers(model)
    with record.step("trace"):
        started = time.perf_counter()
        with peak_memory() as memory:
            pruner = _pruner(model, images, attention)
        record.add(trace_s=time.perf_counter() - started, trace_extra_mb=memory["extra_mb"])
    with record.step("groups"):
        record.add(**_figures(model, pruner))
    with record.step("randomise"):
        randomise(model, images, record)
        original = copy.deepcopy(model)
        _write_positions_(model)
    with record.step("cut"):
        num_pruned = 0
        for group in pruner.step(interactive=True):
            group.prune()
            num_pruned += 1
        reference = _read_positions_(model, original)
        _tell_widths_(model, attention)
        if not num_pruned:
            raise Refused("it finds no group that it would prune")
        record.add(params_kept=sum(p.numel() for p in model.parameters()) / record.figures["num_params"])
    with record.step("forward"):
        check_forward(model, images)
    with record.step("backward"):
        check_backward(original, model, images)
    with record.step("equality"):
        if spanning := _spanning(original, model):
            record.add(equality=f"not comparable: {spanning} spans pruned channels")
        else:
            check_equal(model, reference, images, record)


# --- what it is told --------------------------------------------------------------------------------------------------


def attention_layers(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """Attention module -> its layers whose outputs are divided among its heads."""
    found = {}
    for module in model.modules():
        if not isinstance(getattr(module, "num_heads", None), int) or isinstance(module, nn.MultiheadAttention):
            continue
        for names in QUERY_KEY_VALUE:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
                found[module] = layers
                break
    return found


def _pruner(model: nn.Module, images: Tensor, attention: dict[nn.Module, list[nn.Module]]) -> Any:
    draw = random.Random(1)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    classifiers = [m for m in layers if isinstance(m, nn.Linear | nn.Conv2d) and m.weight.shape[0] == NUM_CLASSES]
    width_of_heads = getattr(getattr(model, "encoder", None), "layers", None) if _is_torchvision_vit(model) else None
    return tp.pruner.BasePruner(
        model,
        images,
        importance=tp.importance.RandomImportance(),
        pruning_ratio_dict={m: draw.uniform(MIN_REMOVED, MAX_REMOVED) for m in layers if m not in classifiers},
        ignored_layers=classifiers,
        num_heads={layer: module.num_heads for module, layers in attention.items() for layer in layers},
        in_channel_groups={},  # its defaults are one dict for all pruners
        out_channel_groups={},
        round_to=width_of_heads[0].num_heads if width_of_heads else None,
        forward_fn=lambda network, batch: network(batch),  # without it, a tensor is taken for a list of arguments
    )


def _tell_widths_(model: nn.Module, attention: dict[nn.Module, list[nn.Module]]) -> None:
    """Its examples do this after pruning; `attn_dim` is younger than they are."""
    for module, layers in attention.items():
        blocks = 3 if len(layers) == 1 else 1
        if hasattr(module, "head_dim"):
            module.head_dim = layers[0].weight.shape[0] // (blocks * module.num_heads)
        if hasattr(module, "attn_dim"):
            module.attn_dim = layers[0].weight.shape[0] // blocks
    if _is_torchvision_vit(model):
        model.hidden_dim = model.conv_proj.out_channels


def _is_torchvision_vit(model: nn.Module) -> bool:
    return type(model).__module__ == "torchvision.models.vision_transformer"


# --- what it removed --------------------------------------------------------------------------------------------------


@torch.no_grad()
def _write_positions_(model: nn.Module) -> None:
    """Each element of each floating-point parameter and buffer becomes its position in the flattened tensor."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)


@torch.no_grad()
def _read_positions_(model: nn.Module, original: nn.Module) -> nn.Module:
    """Values for what is left in `model`; returns a copy of the original in which the removed elements are zero."""
    reference = copy.deepcopy(original)
    values, references = dict(_named_tensors(original)), dict(_named_tensors(reference))
    seen: set[int] = set()
    for name, tensor in _named_tensors(model):
        if id(tensor) in seen or not tensor.is_floating_point():
            continue
        seen.add(id(tensor))
        positions = tensor.data.long().reshape(-1)
        tensor.data = values[name].detach().reshape(-1)[positions].reshape(tensor.shape)
        if isinstance(tensor, nn.Parameter):
            kept = torch.zeros(values[name].numel(), dtype=torch.bool)
            kept[positions] = True
            references[name].masked_fill_(~kept.reshape(values[name].shape), 0)
    return reference


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _spanning(original: nn.Module, pruned: nn.Module) -> str:
    """Name of the first module with a statistic over channels that lost some; empty if there is none."""
    modules = dict(pruned.named_modules())
    for name, module in original.named_modules():
        if SPANNING.search(type(module).__name__) and _widths(module) != _widths(modules[name]):
            return f"{name} ({type(module).__name__})"
    return ""


def _widths(module: nn.Module) -> list[Any]:
    shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
    return [*shapes, *(str(getattr(module, name, "")) for name in ("normalized_shape", "num_channels"))]


# --- what it could remove ---------------------------------------------------------------------------------------------


def _figures(model: nn.Module, pruner: Any) -> dict[str, Any]:
    """Number of the groups that its pruner would prune, and the share of the parameters inside of them."""
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    coverage = Coverage(sizes)
    num_groups = 0
    for group in pruner.DG.get_all_groups(pruner.ignored_layers, pruner.root_module_types):
        if pruner._is_atten_group(group)[0]:
            group = pruner._downstream_node_as_root_if_attention(group)
        if group is None or not pruner._check_pruning_ratio(group):
            continue
        if len(group[0].idxs) // pruner._get_channel_groups(group) > 1:
            num_groups += 1
            for dep, entries in group:
                for name, dim, owned in _owned(pruner.DG, dep, torch.tensor(entries)):
                    coverage.add(name, dim, owned[owned < sizes[name][dim]])  # some groups name entries beyond the end
    return {"num_groups": num_groups, "share": coverage.share()}


def _owned(graph: Any, dep: Any, entries: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """(parameter, dimension, entries) that a dependency of a group prunes."""
    target, is_out = dep.target.module, dep.handler.__name__ == "prune_out_channels"
    if isinstance(target, nn.Parameter):
        yield graph._param_to_name[target], dep.target.pruning_dim, entries
        return
    if not isinstance(target, nn.Module) or target not in graph._module2name:
        return
    prefix = f"{graph._module2name[target]}.".removeprefix(".")
    for name, parameter in target.named_parameters():
        for dim, owned in _dims(target, name, parameter, is_out, entries):
            yield prefix + name, dim, owned


def _dims(
    target: nn.Module, name: str, parameter: Tensor, is_out: bool, entries: Tensor
) -> Iterator[tuple[int, Tensor]]:
    match target:
        case nn.modules.conv._ConvNd():
            rows = is_out or target.groups == target.out_channels > 1  # depthwise: one channel is both
            if rows:
                yield (1 if target.transposed and name == "weight" else 0), entries
            elif name == "weight":
                yield (0, entries) if target.transposed else (1, entries % parameter.shape[1])
        case nn.Linear():
            if is_out or name == "weight":
                yield (0 if is_out else 1), entries
        case nn.MultiheadAttention():
            blocks = parameter.shape[0] // target.embed_dim
            yield 0, torch.cat([entries + block * target.embed_dim for block in range(blocks)])
            if parameter.dim() == 2:
                yield 1, entries
        case nn.LSTM():
            if is_out:
                yield 0, torch.cat([entries + gate * target.hidden_size for gate in range(4)])
            if name.startswith("weight_hh" if is_out else "weight_ih"):
                yield 1, entries
        case _:
            if parameter.dim() and parameter.shape[-1] > 1:
                yield parameter.dim() - 1, entries
