"""Masks: True = keep, for channels and for weights; a network with masked weights, and the bit-packed file.

# C = channels of a group
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors
from torch import Tensor, nn

from pipeline import artifacts
from pipeline.pruning.plan import Plan

FORMAT = "masks/1"


def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """Copy of `model` with zeros where the mask of a parameter is False, a tied weight under all its names.

    Args:
        masks: name of a parameter -> bool, shaped like it.
    """
    model = copy.deepcopy(model)
    own = dict(model.named_parameters())
    mask_(own, {name: mask for name, mask in masks.items() if name in own})
    return model


@torch.no_grad()
def mask_(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Zeros in place where the mask of a tensor is False; masks may lie on another device."""
    for name, mask in masks.items():
        tensors[name].masked_fill_(~mask.to(tensors[name].device), 0)


def not_zero_where_masked(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> list[str]:
    """Names of those that have values where their mask is False."""
    if not masks:
        return []
    found = [tensors[name].detach()[~mask.to(tensors[name].device)].any() for name, mask in masks.items()]
    return [name for name, bad in zip(masks, torch.stack(found).tolist(), strict=True) if bad]  # one transfer


# --- masks as data ----------------------------------------------------------------------------------------------------


def channel_masks(plan: Plan) -> dict[str, Tensor]:
    """Group name -> bool [C], True for the channels that are kept."""
    masks = {}
    for group in plan.groups:
        masks[group.name] = torch.zeros(group.size, dtype=torch.bool)
        masks[group.name][list(group.kept)] = True
    return masks


def pack(mask: Tensor) -> Tensor:
    """uint8 [ceil(numel / 8)]: element i of the flattened mask is bit i % 8 of byte i // 8; unused bits are 0."""
    if mask.dtype != torch.bool:
        raise ValueError(f"a mask is bool (True = keep), got {mask.dtype} {list(mask.shape)}.")
    return torch.from_numpy(np.packbits(mask.detach().cpu().reshape(-1).numpy(), bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Bool mask of this shape from the bytes of `pack`."""
    numel = math.prod(shape)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-numel // 8),):
        raise ValueError(
            f"a mask of shape {list(shape)} is packed into uint8 [{-(-numel // 8)}], "
            f"got {packed.dtype} {list(packed.shape)}."
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=numel, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).reshape(shape)


def masks_sha256(masks: Mapping[str, Tensor]) -> str:
    """Of names, shapes and bits, in the order of the names; neither device nor order of the mapping enters."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        packed = pack(masks[name])
        digest.update(f"{json.dumps(name)} {list(masks[name].shape)} {packed.numel()}\n".encode())
        digest.update(packed.numpy().data)
    return digest.hexdigest()


# --- the file ---------------------------------------------------------------------------------------------------------


class BrokenMasks(ValueError):
    """A mask file is cut off, altered, or something else than a mask file."""


def save_masks(path: str, masks: Mapping[str, Tensor]) -> str:
    """Write all masks into one safetensors file, bit-packed, shapes in its metadata; returns `masks_sha256`.

    The file is seen whole or not at all. The same masks give the same bytes.
    """
    shapes = {name: list(masks[name].shape) for name in sorted(masks)}
    sha256 = masks_sha256(masks)
    # One key: safetensors writes several in an order that changes from process to process.
    metadata = {"masks": json.dumps({"format": FORMAT, "sha256": sha256, "shapes": shapes}, sort_keys=True)}
    artifacts.write_bytes(path, dump_tensors({name: pack(masks[name]) for name in sorted(masks)}, metadata))
    return sha256


def load_masks(path: str) -> dict[str, Tensor]:
    """Masks by name, as they were saved.

    Raises:
        StorageError: nothing is there.
        BrokenMasks: the file is cut off, altered, or no mask file.
    """
    data = artifacts.read_bytes(path)
    try:
        packed, metadata = load_tensors(data), _metadata(data)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, this version reads {FORMAT!r}")
        shapes = metadata["shapes"]
        if set(shapes) != set(packed):
            raise ValueError(f"shapes and masks have different names: {sorted(set(shapes) ^ set(packed))[:5]}")
        masks = {name: unpack(packed[name], tuple(shape)) for name, shape in shapes.items()}
        if masks_sha256(masks) != metadata["sha256"]:
            raise ValueError("its bits do not give the sha256 that was stored with them")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise BrokenMasks(f"{path} is no whole mask file: {error}. Remove it and make the masks anew.") from error
    return masks


def _metadata(data: bytes) -> dict[str, Any]:
    """The safetensors header's metadata: 8 bytes length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return dict(json.loads(header.get("__metadata__", {}).get("masks", "{}")))
